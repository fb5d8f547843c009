"""Settings of sharded models: FSDP2 and expert parallelism through transformers' DistributedConfig."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from onerec_hf.workflows.distributed import num_ranks

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class ShardingSettings:
    """Sharding over ranks; by default each rank has the unsharded model (DDP)."""

    fsdp_size: int = field(
        default=1, metadata={"help": "Ranks that share weights, gradients and optimizer (FSDP2); under torchrun."}
    )
    dp_replicate_size: int = field(
        default=1, metadata={"help": "Number of such groups of ranks, each with all weights (HSDP)."}
    )
    ep_size: int = field(
        default=1, metadata={"help": "Ranks that the experts are split over; divides fsdp_size (expert parallelism)."}
    )

    def check(self, args: TrainingArguments) -> None:
        """
        Raises:
            ValueError: sizes that differ from the launch, or checkpoints that a sharded run cannot write.
        """
        sizes = " ".join(f"--{name} {size}" for name, size in asdict(self).items() if size != 1)
        if not sizes:
            return
        wanted, ranks = self.fsdp_size * self.dp_replicate_size, num_ranks()
        if wanted != ranks or wanted < 2:
            raise ValueError(
                f"{sizes}: fsdp_size * dp_replicate_size must be the number of ranks, at least 2, and this runs in {ranks}; start it with "
                f"torchrun --nproc-per-node {max(wanted, 2)} -m onerec_hf.cli.main ..."
            )
        if args.resume_from_checkpoint is not None or (args.save_strategy != "no" and not args.save_only_model):
            raise ValueError(
                f"{sizes}: transformers cannot save or resume the optimizer of a sharded model; add --save_strategy no, or "
                "--save_only_model true for checkpoints that serve as models, and leave --resume_from_checkpoint out"
            )

    def shard(self, model: Any) -> Any:
        """The rank's shard of a model that is equal on all ranks; the model itself without sharding."""
        if self.fsdp_size == 1:
            return model
        from transformers.distributed.configuration_utils import DistributedConfig

        from onerec_hf.trainers.sharding import shard

        return shard(model, DistributedConfig(**asdict(self)))
