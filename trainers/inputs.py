"""What callers of the trainers give in more than one form: arguments of a base class, a model or its maker, datasets in any format."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments, set_seed

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def own_arguments(args: TrainingArguments | None, kind: type[Arguments], output_dir: str) -> Arguments:
    """
    The arguments as the trainer's own class: of other classes of training arguments, what both have; the rest has its defaults.

    Args:
        output_dir: of new arguments, where there are none.

    Example:
        >>> from transformers import TrainingArguments
        >>> from onerec_hf.trainers import OneRecTrainingArguments
        >>> args = own_arguments(TrainingArguments("out", seed=3, report_to="none"), OneRecTrainingArguments, "other")
        >>> args.output_dir, args.seed, args.eval_num_beams
        ('out', 3, 50)
    """
    if args is None:
        return kind(output_dir)
    if isinstance(args, kind):
        return args
    names = {each.name for each in fields(kind) if each.init}
    given: dict[str, Any] = {each.name: getattr(args, each.name) for each in fields(args) if each.name in names}
    return kind(**given)


def plain_rows(dataset: Any) -> Any:
    """
    A dataset, or a dictionary of datasets, whose rows are lists of Python values, whatever `with_format` says. Anything else stays as it is.

    Example:
        >>> plain_rows(Dataset.from_dict({"history": [[1, 2]]}).with_format("torch"))[0]
        {'history': [1, 2]}
    """
    if isinstance(dataset, dict):
        return {name: plain_rows(each) for name, each in dataset.items()}
    if isinstance(dataset, Dataset):
        return dataset if dataset.format["type"] is None else dataset.with_format(None)
    return dataset.with_format(None) if isinstance(dataset, IterableDataset) else dataset


def first_model(trainer: Trainer, model: Any, model_init: Any, args: TrainingArguments) -> Any:
    """
    The model that a trainer is made with: `model`, or the first one of `model_init`, which the trainer calls anew for each training.

    Raises:
        ValueError: neither or both.
    """
    if (model is None) == (model_init is None):
        raise ValueError("pass either model or model_init")
    if model is not None:
        return model
    set_seed(args.seed)
    trainer.model_init = model_init
    return trainer.call_model_init()


class RankingSearch(Trainer):
    """Trainer mixin. `hyperparameter_search` looks for the best ranking, where Trainer would minimise the sum of all metrics."""

    def hyperparameter_search(
        self,
        hp_space=None,
        compute_objective=None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        *args,
        **kwargs,
    ):
        """
        As `transformers.Trainer.hyperparameter_search`. Without `compute_objective` it maximises NDCG at the largest `args.eval_top_k`, or minimises
        the loss where evaluations do not rank.

        Raises:
            ValueError: a `direction` that contradicts this objective.
        """
        if compute_objective is None:
            ranks = getattr(self.args, "predict_with_generate", True)
            metric = f"eval_ndcg@{max(self.args.eval_top_k)}" if ranks else "eval_loss"  # type: ignore[attr-defined]
            best = "maximize" if ranks else "minimize"
            if direction not in (None, best):
                raise ValueError(
                    f"direction={direction!r}: the objective is {metric}, to {best}. Leave direction out, or pass compute_objective"
                )
            direction = best

            def compute_objective(metrics: dict[str, float]) -> float:
                return metrics[metric]

        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", *args, **kwargs
        )
