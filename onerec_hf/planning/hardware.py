"""Published peak numbers of GPUs, for lower bounds of a step's time. None of them was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """
    Peaks from the data sheets, without sparsity.

    Args:
        name: product name.
        memory: GiB.
        bfloat16, float32: matrix products, TFLOP/s; float32 is true float32, torch's default.
        memory_bandwidth: GB/s.
        node_bandwidth: GB/s that one GPU sends to others of its machine, one direction.
        network_bandwidth: GB/s that one GPU sends to other machines, one direction.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


GPUS = {
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s dense, HBM3 3.35 TB/s, NVLink 900 GB/s both directions; 400 Gbit/s of network per GPU as in DGX H100.
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 80, 989, 67, 3350, 450, 50),
    # NVIDIA A100 80 GB SXM data sheet: 312 TFLOP/s dense, HBM2e 2.039 TB/s, NVLink 600 GB/s; 200 Gbit/s per GPU as in DGX A100.
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 80, 312, 19.5, 2039, 300, 25),
}
