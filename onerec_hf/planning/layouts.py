"""
Strategies of distributed training: the bytes that each GPU holds, and the collectives of a step.

DDP is `torch.nn.parallel.DistributedDataParallel` as accelerate configures it. FSDP, HSDP and expert parallelism are transformers'
`DistributedConfig(fsdp_size, dp_replicate_size, ep_size)`, in mixed precision with `fsdp_mixed_precision=True`. ZeRO-3 is DeepSpeed's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onerec_hf.planning.activations import AUTOCAST, BFLOAT16, FLOAT32, Batch, Precision
from onerec_hf.planning.parameters import (
    autocast_parameters,
    buffer_bytes,
    count_parameters,
    is_lazy,
    tied_parameters,
    units,
    vector_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onerec_hf.modeling.configuration_onerec import OneRecConfig

STRATEGIES = ("ddp", "fsdp", "fsdp+ep", "hsdp", "hsdp+ep", "zero3")
# float32: everything. mixed: weights, gradients and optimizer in float32, products in bfloat16. bfloat16: everything.
DTYPES = ("float32", "mixed", "bfloat16")
# DeepSpeed's default stage3_max_live_parameters and stage3_max_reuse_distance, the elements that stay gathered.
ZERO3_LIVE = 10**9


@dataclass(frozen=True)
class Collective:
    """
    A collective operation of a step.

    Args:
        kind: all_reduce, all_gather, reduce_scatter or all_to_all.
        payload: bytes of the whole buffer that is reduced, gathered or scattered; for all_to_all, what one GPU sends on average.
        ranks: number of participating GPUs, in order of machines.
        spread: distance from one participant to the next: 1 for neighbours.
        what: the tensors.
    """

    kind: str
    payload: int
    ranks: int
    spread: int
    what: str

    def sent(self, gpus_per_node: int) -> tuple[float, float]:
        """
        Lower bounds of the bytes that a GPU sends inside its machine and to other machines. The GPUs of a machine share the traffic between machines.
        For all_to_all experts are assumed balanced.

        Example:
            >>> Collective("all_reduce", payload=1600, ranks=16, spread=1, what="gradients").sent(gpus_per_node=8)
            (2800.0, 200.0)
        """
        inside = min(self.ranks, max(1, gpus_per_node // self.spread))
        if self.kind == "all_to_all":
            return self.payload * (inside - 1) / self.ranks, self.payload * (self.ranks - inside) / self.ranks
        nodes = -(-self.ranks // inside)
        total = self.payload * (2 if self.kind == "all_reduce" else 1)
        return total * (inside - 1) / inside, total * (nodes - 1) / nodes / inside


@dataclass(frozen=True)
class Layout:
    """
    A strategy on a number of GPUs.

    Args:
        strategy: one of `STRATEGIES`.
        gpus: all GPUs: replicas * shards.
        shards: GPUs that share one copy of weights, gradients and optimizer states (`fsdp_size`).
        experts: GPUs that share the experts (`ep_size`).

    Example:
        >>> Layout("hsdp", gpus=16, shards=8).replicas
        2
    """

    strategy: str
    gpus: int
    shards: int = 1
    experts: int = 1

    @property
    def replicas(self) -> int:
        """Copies of the model (`dp_replicate_size`)."""
        return self.gpus // self.shards

    @property
    def expert_shards(self) -> int:
        """GPUs that share the weights of one expert (`DistributedConfig.efsdp_size`)."""
        return self.shards // self.experts

    def precision(self, dtype: str) -> Precision:
        """Precision of the forward pass: Trainer's autocast with DDP; sharded weights are gathered in bfloat16 without autocast."""
        if dtype == "mixed":
            return AUTOCAST if self.strategy == "ddp" else BFLOAT16
        return FLOAT32 if dtype == "float32" else BFLOAT16

    def problem(self, config: OneRecConfig) -> str | None:
        """Why this layout cannot train the model; None if it can."""
        if self.gpus % self.shards:
            return f"{self.gpus} GPUs are not a multiple of {self.shards} shards"
        if self.experts > 1 and config.num_experts == 1:
            return "the decoder is dense, without experts to distribute"
        if self.experts > 1 and is_lazy(config):
            return "OneRec-V2 does not distribute its experts"
        if config.num_experts % self.experts or self.shards % self.experts:
            return f"ep_size {self.experts} must divide {config.num_experts} experts and {self.shards} shards"
        if self.shards > 1 and vector_blocks(config):
            return "the item head's vectors of low rank are not sharded: leave rank out, or use ddp"
        table = config.vocab_size or 0
        if "sdp" in self.strategy and config.tie_word_embeddings and table % self.shards:
            return f"the tied embedding has {table} rows, not a multiple of {self.shards} shards: set vocab_size to a multiple"
        return None

    def memory(self, config: OneRecConfig, dtype: str) -> dict[str, int]:
        """
        Bytes on the GPU that holds the most, by name: `weights`, `gradients`, `optimizer` (AdamW's two moments, and the strategy's own states),
        `buffers`, and `gathered`: temporary copies at the strategy's peak (DDP's buckets, gathered weights, autocast's copies).
        """
        element = 2 if dtype == "bfloat16" else 4
        if self.strategy == "zero3":
            return self._zero3(config, dtype)
        if self.strategy == "ddp":
            held, full = count_parameters(config), count_parameters(config)
            gathered = element * full if self.gpus > 1 else 0  # the reducer's buckets: a second copy of the gradients
            gathered += 2 * autocast_parameters(config) if dtype == "mixed" else 0
        else:
            held, gathered = self._sharded(config), self._gathered(config, dtype)
        return {
            "weights": element * held,
            "gradients": element * held,
            "optimizer": 2 * element * held,
            "buffers": buffer_bytes(config),
            "gathered": gathered,
        }

    def _units(self, config: OneRecConfig):
        return units(config, expert_parallel=self.experts > 1)

    def _ranks(self, unit) -> int:
        """GPUs over which FSDP shards a group, after expert parallelism has distributed the experts."""
        return self.expert_shards if unit.experts else self.shards

    def _dealt(self, unit):
        """The group that FSDP shards: with the experts of this GPU only."""
        if not unit.experts:
            return unit
        shapes = tuple((shape[0] // self.experts, *shape[1:]) for shape in unit.shapes)
        return type(unit)(unit.name, shapes, unit.copies, unit.regathered, unit.experts)

    def computed_parameters(self, config: OneRecConfig) -> int:
        """Parameters that this GPU computes with: all except the experts of other GPUs."""
        total = sum(self._dealt(unit).parameters * unit.copies for unit in self._units(config))
        return total - tied_parameters(config)

    def _sharded(self, config: OneRecConfig) -> int:
        """Parameters on the GPU that holds the most. A tied embedding is held once."""
        total = sum(self._dealt(unit).shard(self._ranks(unit)) * unit.copies for unit in self._units(config))
        if config.tie_word_embeddings:
            total -= 2 * -(-(config.vocab_size or 0) // self.shards) * config.hidden_size
        return total

    def _gathered(self, config: OneRecConfig, dtype: str) -> int:
        """
        The root's weights and gradients; the weights of a layer and of the next, fetched ahead, with the layer's gradients as they are computed and as
        they are reduced. The encoder's embeddings are gathered as long as its layers run.
        """
        weight, reduced = (4, 4) if dtype == "float32" else (2, 2 if dtype == "bfloat16" else 4)
        sizes = {unit.name: self._dealt(unit).parameters for unit in self._units(config)}
        encoder = (2 * weight + reduced) * sizes["encoder"] + (3 * weight + reduced) * sizes["encoder layer"]
        decoder = (3 * weight + reduced) * (sizes["decoder layer"] + sizes.get("experts", 0))
        return 2 * weight * sizes["root"] + max(encoder, decoder)

    def _zero3(self, config: OneRecConfig, dtype: str) -> dict[str, int]:
        """
        DeepSpeed splits every tensor into equal pieces, keeps float32 weights for the optimizer in addition to those of the model, and leaves up to
        `ZERO3_LIVE` elements gathered.
        """
        parameters = count_parameters(config)
        held = -(-parameters // self.gpus)
        model = 4 if dtype == "float32" else 2
        return {
            "weights": model * held,
            "gradients": model * held,
            "optimizer": 12 * held,
            "buffers": buffer_bytes(config),
            "gathered": model * min(parameters, ZERO3_LIVE),
        }

    def collectives(
        self, config: OneRecConfig, batch: Batch, dtype: str, checkpointing: bool = False
    ) -> list[Collective]:
        """The collectives of a step of one forward and one backward pass."""
        if self.gpus == 1:
            return []
        weight, reduced = (4, 4) if dtype == "float32" else (2, 2 if dtype == "bfloat16" else 4)
        parameters = count_parameters(config)
        if self.strategy == "ddp":
            gradients = parameters * (2 if dtype == "bfloat16" else 4)
            return [Collective("all_reduce", gradients, self.gpus, 1, "gradients")]
        if self.strategy == "zero3":
            gathers = Collective("all_gather", 2 * weight * parameters, self.gpus, 1, "weights")
            return [gathers, Collective("reduce_scatter", weight * parameters, self.gpus, 1, "gradients")]
        found = []
        for unit in self._units(config):
            dealt, ranks = self._dealt(unit), self._ranks(unit)
            spread = self.experts if unit.experts else 1
            padded = dealt.shard(ranks) * ranks * unit.copies
            if ranks > 1:
                times = 2 if unit.regathered else 1
                found.append(Collective("all_gather", times * weight * padded, ranks, spread, unit.name))
                found.append(Collective("reduce_scatter", reduced * padded, ranks, spread, unit.name))
            if self.replicas > 1:
                found.append(
                    Collective("all_reduce", reduced * padded // ranks, self.replicas, self.shards, unit.name)
                )
        if self.experts > 1:
            rows = batch.tokens(config)[1] * config.num_experts_per_tok * config.sparse_layers
            # There and back, in the forward pass, in the recomputation, and in the backward pass.
            times = 6 if checkpointing else 4
            element = self.precision(dtype).expert
            found.append(
                Collective("all_to_all", times * rows * config.hidden_size * element, self.experts, 1, "tokens")
            )
        return found


def default_expert_ranks(config: OneRecConfig, shards: int, gpus_per_node: int) -> int:
    """The largest number of GPUs of one machine that share the experts evenly."""
    most = min(shards, gpus_per_node)
    return max(n for n in range(1, most + 1) if config.num_experts % n == 0 and shards % n == 0)


def layouts(
    config: OneRecConfig,
    gpus: int,
    strategies: Sequence[str] = STRATEGIES,
    gpus_per_node: int = 8,
    ep_size: int | None = None,
) -> list[Layout]:
    """
    The layouts of these strategies that are possible on `gpus` GPUs. HSDP shards inside a machine and replicates across machines.

    Raises:
        ValueError: an unknown strategy, or fewer than one GPU.
    """
    if gpus < 1 or gpus_per_node < 1:
        raise ValueError(f"--gpus {gpus} and --gpus_per_node {gpus_per_node} must be at least 1")
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown:
        raise ValueError(f"--strategy {unknown[0]}: choose among {', '.join(STRATEGIES)}")
    found = []
    for strategy in strategies:
        kind, _, with_experts = strategy.partition("+")
        if kind == "hsdp" and (gpus <= gpus_per_node or gpus % gpus_per_node):
            continue
        if gpus == 1 and kind != "ddp":
            continue
        shards = {"ddp": 1, "hsdp": gpus_per_node}.get(kind, gpus)
        experts = 1
        if with_experts:
            if config.num_experts == 1:
                continue
            experts = ep_size or default_expert_ranks(config, shards, gpus_per_node)
            if experts == 1:
                continue
        found.append(Layout(strategy, gpus, shards, experts))
    return found
