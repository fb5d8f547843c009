"""
How the experts are computed where speed counts: the implementation "onerec" of transformers' experts interface, which the model takes
unless it is told another (`experts_implementation=` of `from_pretrained`).

With gradients, on accelerators, under `torch.compile` and with expert parallelism it is transformers' "grouped_mm". On a CPU without
gradients the tokens are sorted by expert and each expert's few tokens go through it at once, so that what lies between its two products stays in
the cache, and the products are oneDNN's, which is faster than the default one where a weight meets few rows (benchmarks/generation.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward


def product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `F.linear(states, weight)` without gradients, by oneDNN where that is faster.

    Args:
        states: (rows, width).
        weight: (outputs, width), or what `torch.ops.mkldnn._reorder_linear_weight` made of it.
    """
    if states.device.type == "cpu" and states.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return F.linear(states, weight)


def segmented_experts(experts, gate_up, down, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """
    Experts' outputs for (tokens, width) states, expert by expert, without gradients.

    Args:
        experts: the `OneRecExperts`.
        gate_up, down: per expert a (2 * inner, width) and a (width, inner) weight.
        top_k_index, top_k_weights: (tokens, k) chosen experts and their gates.
    """
    tokens, k = top_k_index.shape
    chosen = top_k_index.flatten()
    order = chosen.argsort()
    sorted_states = hidden_states[order // k]
    out = torch.empty_like(sorted_states)
    start = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=experts.num_experts).tolist()):
        if count:
            rows = slice(start, start + count)
            gate, up = product(sorted_states[rows], gate_up[expert]).chunk(2, dim=-1)
            out.index_copy_(0, order[rows], product(experts.act_fn(gate).mul_(up), down[expert]))
            start += count
    return out.view(tokens, k, -1).mul_(top_k_weights[..., None]).sum(1)


@dataclass
class PackedExperts:
    """
    A layer's expert weights in the layout that oneDNN multiplies with, one tensor per expert, and what they were made of.

    Args:
        sources: the parameters `gate_up_proj` and `down_proj`.
    """

    sources: tuple[torch.Tensor, torch.Tensor]

    def __post_init__(self):
        self.versions = [source._version for source in self.sources]
        self.gate_up, self.down = (
            [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in source.detach()] for source in self.sources
        )

    def holds(self, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
        """Whether these are the weights that were packed, unchanged: an adapter's are others."""
        now = (gate_up, down)
        return all(a is b for a, b in zip(now, self.sources, strict=True)) and self.versions == [
            a._version for a in now
        ]


@contextmanager
def packed(layers: list) -> Iterator[None]:
    """Keeps packed copies of the weights of `OneRecExperts` that a CPU holds in float32, for as long as the context lasts."""
    packable = [
        experts
        for experts in layers
        if experts.gate_up_proj.device.type == "cpu"
        and experts.gate_up_proj.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ]
    for experts in packable:
        experts.packed = PackedExperts((experts.gate_up_proj, experts.down_proj))
    try:
        yield
    finally:
        for experts in packable:
            experts.packed = None


def onerec_experts_forward(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """The experts interface's function: what this file's head says."""
    if (
        hidden_states.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or self._is_expert_parallel
    ):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    gate_up, down = self.gate_up_proj, self.down_proj
    if self.packed is not None and self.packed.holds(gate_up, down):
        gate_up, down = self.packed.gate_up, self.packed.down
    return segmented_experts(self, gate_up, down, hidden_states, top_k_index, top_k_weights)


EXPERTS_IMPLEMENTATION = "onerec"
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, onerec_experts_forward)

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "PackedExperts",
    "onerec_experts_forward",
    "packed",
    "product",
    "segmented_experts",
]
