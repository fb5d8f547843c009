"""The facts of a training run, read from its trainer: what every card may report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onerec_hf.data.packing import PackedDataset

# Evaluation log entries that are not model metrics.
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True)
class Training:
    """
    The facts of a training run, read from any trainer by [`of`].

    Args:
        trainer: class name of the trainer.
        examples: number of training examples, None for a stream.
        settings: the main hyperparameters, by name.
        loss: the last logged mean training loss, or None.
        evaluation: metrics of the last evaluation during training.
        evaluated_at: step of that evaluation.

    Example:
        >>> Training("OneRecTrainer", 100, {"seed": 0}).evaluation
        {}
    """

    trainer: str
    examples: int | None
    settings: dict[str, Any]
    loss: float | None = None
    evaluation: dict[str, float] | None = None
    evaluated_at: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "evaluation", self.evaluation or {})

    @classmethod
    def of(cls, trainer: Any) -> Training:
        """Reads a `transformers.Trainer`: arguments, steps, and the last logged losses and metrics."""
        args, state = trainer.args, trainer.state
        dataset = trainer.train_dataset
        if isinstance(dataset, PackedDataset):
            dataset = dataset.dataset  # the examples inside the packed rows
        settings = {
            "steps": state.global_step,
            "epochs": round(state.epoch or 0, 2),
            "examples in a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning rate": args.learning_rate,
            "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "weight decay": args.weight_decay,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights",
            "seed": args.seed,
        }
        if getattr(args, "packing", False):
            settings["rows in a step"] = settings.pop("examples in a step")
        losses = [entry.get("train_loss", entry.get("loss")) for entry in state.log_history]
        evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
        last = evaluations[-1] if evaluations else {}
        metrics = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
        return cls(
            type(trainer).__name__,
            len(dataset) if hasattr(dataset, "__len__") else None,
            settings,
            next((loss for loss in reversed(losses) if loss is not None), None),
            {name: value for name, value in metrics.items() if not name.endswith(_TIMINGS)},
            last.get("step"),
        )
