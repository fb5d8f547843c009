"""Plans: memory per GPU, communication and lower bounds of time per step of each layout, and whether it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onerec_hf.planning.activations import Batch, activations
from onerec_hf.planning.compute import step_flops
from onerec_hf.planning.hardware import GPUS, Gpu
from onerec_hf.planning.layouts import DTYPES, Layout
from onerec_hf.planning.parameters import active_parameters, count_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onerec_hf.modeling.configuration_onerec import OneRecConfig

GIB, GB = 2**30, 10**9
# Share of the GPU's memory for the CUDA context, NCCL's buffers and fragmentation. An assumption, not a measurement.
RESERVE = 0.1


@dataclass(frozen=True)
class Plan:
    """
    The plan of one layout.

    Args:
        layout: strategy and sizes.
        memory: bytes on the GPU that holds the most, by name: `weights`, `gradients`, `optimizer`, `activations`, `logits`, `other` (buckets,
            gathered weights, autocast's copies, exchanged rows, buffers). They do not all peak at once: their sum is an upper bound.
        sent_in_node, sent_between_nodes: lower bounds of the bytes that a GPU sends per step inside its machine and over the network.
        flops: operations of one GPU per step, with checkpointing's recomputation.
        seconds: lower bounds of a step by `compute`, `memory` traffic and `communication`, each at the GPU's published peak.
        fits: whether the sum of memory leaves the reserve free.
        problem: why the layout cannot train the model, or None.
    """

    layout: Layout
    memory: dict[str, int]
    sent_in_node: float
    sent_between_nodes: float
    flops: int
    seconds: dict[str, float]
    fits: bool
    problem: str | None

    @property
    def total(self) -> int:
        """Bytes per GPU, an upper bound."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """The largest of the lower bounds: the time of a step with perfect overlap."""
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        """The name of the largest lower bound."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON, in bytes and seconds."""
        return {
            **asdict(self.layout),
            "replicas": self.layout.replicas,
            "memory": {**self.memory, "total": self.total},
            "sent_in_node": round(self.sent_in_node),
            "sent_between_nodes": round(self.sent_between_nodes),
            "flops": self.flops,
            "seconds": {**self.seconds, "step": self.step_seconds},
            "limit": self.limit,
            "fits": self.fits,
            "problem": self.problem,
        }


def make_plan(
    config: OneRecConfig,
    layout: Layout,
    batch: Batch,
    dtype: str = "mixed",
    checkpointing: bool = False,
    gpu: Gpu = GPUS["h100"],
    gpus_per_node: int = 8,
) -> Plan:
    """
    The plan of one layout.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> config = OneRecConfig(hidden_size=1024, intermediate_size=4096, encoder_layers=12, decoder_layers=12)
        >>> plan = make_plan(config, Layout("fsdp", gpus=8, shards=8), Batch(users=64))
        >>> plan.fits, plan.memory["optimizer"]
        (True, 3927078912)
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose among {', '.join(DTYPES)}")
    made = activations(config, batch, layout.precision(dtype), expert_ranks=layout.experts)
    held = layout.memory(config, dtype)
    memory = {
        "weights": held["weights"],
        "gradients": held["gradients"],
        "optimizer": held["optimizer"],
        "activations": made.kept(checkpointing),
        "logits": made.logits,
        "other": held["buffers"] + held["gathered"] + made.exchange,
    }
    sent = [c.sent(gpus_per_node) for c in layout.collectives(config, batch, dtype, checkpointing)]
    in_node, between_nodes = sum(part[0] for part in sent), sum(part[1] for part in sent)
    flops = step_flops(config, batch, checkpointing)
    # Both passes read the weights, and gradients are written. The optimizer reads weights, gradients and moments and writes all but the gradients.
    # Activations are written and read.
    element = 4 if dtype == "float32" else 2
    traffic = 3 * element * layout.computed_parameters(config) + 2 * (memory["activations"] + memory["logits"])
    traffic += 2 * (held["weights"] + held["optimizer"]) + held["gradients"]
    seconds = {
        "compute": flops / (1e12 * (gpu.float32 if dtype == "float32" else gpu.bfloat16)),
        "memory": traffic / (GB * gpu.memory_bandwidth),
        "communication": max(in_node / (GB * gpu.node_bandwidth), between_nodes / (GB * gpu.network_bandwidth)),
    }
    problem = layout.problem(config)
    fits = problem is None and sum(memory.values()) <= (1 - RESERVE) * gpu.memory * GIB
    return Plan(layout, memory, in_node, between_nodes, flops, seconds, fits, problem)


def make_plans(config: OneRecConfig, found: Sequence[Layout], batch: Batch, **options) -> list[Plan]:
    """[`make_plan`] for several layouts."""
    return [make_plan(config, layout, batch, **options) for layout in found]


# From the simplest to the most complex.
SIMPLEST_FIRST = ("ddp", "hsdp", "fsdp", "hsdp+ep", "fsdp+ep", "zero3")


def best(plans: Sequence[Plan]) -> Plan | None:
    """
    The simplest plan that fits and whose lower bound is within 50 % or 10 ms of the fastest one; None if nothing fits. The 10 ms are an assumed cost of
    kernel launches.
    """
    fitting = [plan for plan in plans if plan.fits]
    least = min((plan.step_seconds for plan in fitting), default=0.0)
    close = [plan for plan in fitting if plan.step_seconds <= max(1.5 * least, least + 0.010)]
    return min(close, key=lambda plan: SIMPLEST_FIRST.index(plan.layout.strategy), default=None)


def gib(count: float) -> str:
    return f"{count / GIB:.1f}" if count >= 0.05 * GIB else f"{count / GIB:.2g}"


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f}" if count >= 0.05 * GB else f"{count / GB:.2g}"


HEADER = (
    *(
        "strategy",
        "shards",
        "experts",
        "copies",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "other",
    ),
    *("GiB per GPU", "fits", "GB in node", "GB network", "ms at least", "limit"),
)


def table(plans: Sequence[Plan]) -> list[list[str]]:
    """Rows under `HEADER`: GiB, GB and milliseconds as text."""
    return [
        [
            plan.layout.strategy,
            str(plan.layout.shards),
            str(plan.layout.experts),
            str(plan.layout.replicas),
            *map(gib, plan.memory.values()),
            gib(plan.total),
            "yes" if plan.fits else "no",
            gigabytes(plan.sent_in_node),
            gigabytes(plan.sent_between_nodes),
            f"{1000 * plan.step_seconds:.3g}",
            plan.limit,
        ]
        for plan in plans
    ]


def summary(config: OneRecConfig, batch: Batch) -> str:
    """One line about the model and the batch."""
    encoder, decoder = batch.tokens(config)
    return (
        f"{count_parameters(config):,} parameters, {active_parameters(config):,} active; {batch.users} users per GPU: "
        f"{encoder:,} history {'items' if config.encoder_pools_items else 'tokens'}, {decoder:,} session tokens"
    )
