"""A saved or trained model ranks the whole catalogue for held-out items, with popularity and item-kNN as baselines."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.evaluation.results import result_row
from onerec_hf.workflows.artefact import (
    catalogue_of,
    load_model,
    load_processor,
    load_ranking,
    load_sequential,
    model_type,
    set_ranking_weights,
)
from onerec_hf.workflows.dataset import ItemLookup, RecommendationDataset, check_catalogue
from onerec_hf.workflows.distributed import is_first, joined_on_cpu, wait
from onerec_hf.workflows.loading import as_dataset
from onerec_hf.workflows.results import Result
from onerec_hf.workflows.settings import DataSettings, gather

if TYPE_CHECKING:
    from collections.abc import Callable

    import datasets

    from onerec_hf.baselines import SequentialRecommender
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

#: The `model_type` of sequence models.
SEQUENTIAL = "onerec_baseline"
#: The names of saved baselines by their `model_type`.
RANKINGS = {"onerec_popularity": "popularity", "onerec_item_knn": "item_knn"}


@dataclass
class EvaluateSettings:
    """The model to evaluate and the options of the ranking."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved OneRec, SASRec, HSTU, GRU4Rec, popularity or item-kNN: folder or Hub id."},
    )
    split: str = field(default="test", metadata={"help": "test or validation."})
    top_k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "The k of the metrics."})
    num_beams: int = field(default=50, metadata={"help": "Beams per user; at least the largest k."})
    exclude_seen: bool = field(default=True, metadata={"help": "Leave out the items of a user's history."})
    baselines: bool = field(
        default=True,
        metadata={"help": "Also rank with popularity and item-kNN, which need all training sequences in memory."},
    )
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    item_score_weight: float | None = field(
        default=None, metadata={"help": "Weight of the item head's scores; the model's default if not given."}
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: no model, an unknown split, or numbers that do not fit together.
        """
        if self.model is None:
            raise ValueError("pass --model: the folder or Hub id of a saved OneRec")
        if self.split not in ("test", "validation"):
            raise ValueError(f"--split is test or validation, not {self.split!r}")
        if min(self.top_k) < 1 or self.num_beams < max(self.top_k) or self.batch_size < 1:
            raise ValueError(
                f"--top_k {' '.join(map(str, self.top_k))} with --num_beams {self.num_beams} and --batch_size {self.batch_size}: all must be at "
                "least 1, and num_beams at least the largest top_k"
            )


def evaluate(data: RecommendationDataset | DataSettings, *settings: object, **options) -> Result:
    """
    Recall, NDCG, MRR and coverage of a saved generator or sequence model on held-out items, and of the baselines. Under torchrun the ranks share the users.

    Args:
        data: a dataset, or the settings to load one.
        settings: [`EvaluateSettings`], optional.
        options: single fields of them, e.g. `model="runs/mine"`.

    Raises:
        ValueError: options that do not fit together, no model in the folder, or items of the data that its catalogue lacks.

    Example:
        >>> evaluate(dataset, model="runs/mine", top_k=[10]).metrics["onerec/recall@10"]  # doctest: +SKIP
        0.21
    """
    (how,) = gather((EvaluateSettings,), settings, options)
    assert isinstance(how, EvaluateSettings)
    how.check()
    assert how.model is not None
    kind = model_type(how.model)
    if kind == SEQUENTIAL:
        rows = _sequential_rows(load_sequential("--model", how.model), data, how)
    elif kind in RANKINGS:
        model, items = load_ranking("--model", how.model)
        rows = _item_rows(
            RANKINGS[kind], items, lambda histories, k: model.recommend(histories, k, how.exclude_seen), data, how
        )
    else:
        rows = _generator_rows(load_processor("--model", how.model), load_model("--model", how.model), data, how)
    wait()
    return Result(rows)


def _generator_rows(
    processor: OneRecProcessor,
    model: OneRecForConditionalGeneration,
    data: RecommendationDataset | DataSettings,
    how: EvaluateSettings,
) -> list[dict[str, Any]]:
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    set_ranking_weights(model, how.item_score_weight)
    dataset = as_dataset(data)
    check_catalogue(f"--model {how.model}", catalogue_of(processor), dataset)
    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch,
            per_device_eval_batch_size=how.batch_size,
            eval_top_k=how.top_k,
            eval_num_beams=how.num_beams,
            eval_exclude_seen=how.exclude_seen,
            use_cpu=joined_on_cpu(),
        )
        trainer = OneRecTrainer(model, args, processing_class=processor)
        return evaluate_beside_baselines(trainer, dataset, how.split, how.baselines)


def _sequential_rows(
    model: SequentialRecommender, data: RecommendationDataset | DataSettings, how: EvaluateSettings
) -> list[dict[str, Any]]:
    """The rows of a sequence model under the name of its architecture; the first rank ranks."""
    import torch

    assert model.items is not None
    if torch.accelerator.is_available():
        model.to(device=torch.accelerator.current_accelerator())  # pyright: ignore[reportCallIssue]
    return _item_rows(
        model.config.architecture,
        model.items,
        lambda histories, k: model.rank(histories, k, how.exclude_seen, how.batch_size),
        data,
        how,
    )


def _item_rows(
    name: str,
    items: ItemLookup,
    rank: Callable[[list[np.ndarray], int], np.ndarray],
    data: RecommendationDataset | DataSettings,
    how: EvaluateSettings,
) -> list[dict[str, Any]]:
    """The rows of a model that ranks items: `rank` takes histories of item indices and k."""
    from onerec_hf.evaluation import ranking_metrics

    dataset = as_dataset(data)
    check_catalogue(f"--model {how.model}", items, dataset)
    if not is_first():
        return []
    histories, relevant = _indices(held_out(dataset, how.split), items)
    ranked = rank(histories, max(how.top_k))
    metrics = ranking_metrics(ranked, relevant, tuple(how.top_k), len(items))
    rows = [
        result_row(f"{name}/{metric}", value, "share", f"popularity/{metric}" if how.baselines else None)
        for metric, value in metrics.items()
    ]
    if how.baselines:
        others = _baseline_rows(dataset, items, how.split, tuple(how.top_k), how.exclude_seen)
        rows += [row for row in others if not row["name"].startswith(f"{name}/")]  # the model is one of them
    return rows


def ranking_rows(
    model, processor: OneRecProcessor, data: RecommendationDataset, use_cpu: bool
) -> list[dict[str, Any]]:
    """
    Result rows of a model in memory and of the baselines, on the test split.

    Args:
        use_cpu: as in the training arguments: the latest arguments determine how the ranks are joined.
    """
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch, per_device_eval_batch_size=64, report_to="none", disable_tqdm=True, use_cpu=use_cpu
        )
        trainer = OneRecTrainer(model, args, processing_class=processor)
        return evaluate_beside_baselines(trainer, data, "test")


def evaluate_beside_baselines(
    trainer: OneRecTrainer, data: RecommendationDataset, split: str, baselines: bool = True
) -> list[dict[str, Any]]:
    """
    Result rows of the trainer's model and, with `baselines`, of popularity and item-kNN on a split: full catalogue, seen items excluded as
    in `trainer.args`. Ranks share the model's users; the first rank gets the rows, the others none.
    """
    args, processor = cast("OneRecTrainingArguments", trainer.args), cast("OneRecProcessor", trainer.processing_class)
    catalogue = processor.catalogue
    assert catalogue is not None
    args.predict_with_generate, args.prediction_loss_only = True, False  # whatever evaluations during training did
    trainer.compute_metrics = trainer.compute_metrics or trainer.compute_ranking_metrics
    examples = held_out(data, split)
    with contextlib.redirect_stdout(sys.stderr):
        metrics = trainer.evaluate(examples, metric_key_prefix=split)  # pyright: ignore[reportArgumentType]
    if not is_first():
        return []
    measured = [name for name in metrics if "@" in name]
    rows = [
        result_row(
            f"onerec/{name.removeprefix(f'{split}_')}",
            metrics[name],
            "share",
            against=f"popularity/{name.removeprefix(f'{split}_')}" if baselines else None,
        )
        for name in measured
    ]
    if baselines:
        rows += _baseline_rows(data, catalogue, split, tuple(args.eval_top_k), args.eval_exclude_seen)
    rows.append(result_row("invalid_id_rate", metrics[f"{split}_invalid_id_rate"], "share"))
    return rows


def _baseline_rows(
    data: RecommendationDataset, items: ItemLookup, split: str, ks: tuple[int, ...], exclude_seen: bool
) -> list[dict[str, Any]]:
    """Result rows of popularity and item-kNN."""
    from onerec_hf.evaluation import ranking_metrics

    rankings, relevant = baseline_rankings(data, items, split, max(ks), exclude_seen)
    return [
        result_row(f"{name}/{metric}", value, "share")
        for name, ranked in rankings.items()
        for metric, value in ranking_metrics(ranked, relevant, ks, len(items)).items()
    ]


def baseline_rankings(
    data: RecommendationDataset, items: ItemLookup, split: str, k: int, exclude_seen: bool = True
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Item indices that popularity and item-kNN rank for a split's histories, and those of the targets, (users, items) padded with -1. The
    baselines rank the whole catalogue, as the model does.
    """
    from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline

    histories, relevant = _indices(held_out(data, split), items)
    sequences = data.train_sequences
    train = np.split(items.indices(sequences.item_ids), sequences.offsets[1:-1])
    rankings = {}
    for name, baseline in (("popularity", PopularityBaseline()), ("item_knn", ItemKNNBaseline())):
        rankings[name] = baseline.fit(train, len(items)).recommend(histories, k, exclude_seen)
    return rankings, relevant


def _indices(examples: datasets.Dataset, items: ItemLookup) -> tuple[list[np.ndarray], np.ndarray]:
    """Histories and targets as item indices; targets are (users, items), padded with -1."""
    histories = [items.indices(history) for history in examples["history"]]
    sessions = [items.indices(session) for session in examples["session"]]
    relevant = np.full((len(sessions), max(map(len, sessions))), -1)
    for row, session in zip(relevant, sessions, strict=True):
        row[: len(session)] = session
    return histories, relevant


def held_out(data: RecommendationDataset, split: str) -> datasets.Dataset:
    """The examples of "validation" or "test"."""
    return data.validation if split == "validation" else data.test
