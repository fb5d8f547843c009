"""A saved or trained model ranks the whole catalogue for held-out items, with popularity and item-kNN as baselines."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.evaluation.held_out import seen_items
from onerec_hf.evaluation.results import result_row
from onerec_hf.workflows.artefact import (
    RANKINGS,
    SEQUENTIAL,
    catalogue_of,
    check_dtype,
    check_finite,
    load_model,
    load_processor,
    load_ranking,
    load_sequential,
    model_type,
    set_ranking_weights,
)
from onerec_hf.workflows.data_options import differences, excludes_seen, read_data_options
from onerec_hf.workflows.dataset import ItemLookup, RecommendationDataset
from onerec_hf.workflows.distributed import is_first, joined_on_cpu, say, wait
from onerec_hf.workflows.loading import as_dataset, data_and_options
from onerec_hf.workflows.new_items import check_choice, settled
from onerec_hf.workflows.results import Result
from onerec_hf.workflows.settings import DataSettings, DtypeSettings, gather, given_options

if TYPE_CHECKING:
    from collections.abc import Callable

    import datasets
    from transformers.trainer_utils import EvalPrediction

    from onerec_hf.baselines import SequentialRecommender
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments


@dataclass
class EvaluateSettings(DtypeSettings):
    """The model to evaluate and the options of the ranking."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved OneRec, SASRec, HSTU, GRU4Rec, ACVAE, popularity or item-kNN: folder or Hub id."},
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
    new_items: str = field(
        default="error",
        metadata={
            "help": "Items of the data that the model does not hold: error, skip (leave out their rows) or add (to a copy of the model, without training)."
        },
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: no model, an unknown split, or numbers that do not fit together.
        """
        if self.model is None:
            raise ValueError("pass --model: the folder or Hub id of a saved OneRec")
        check_choice(self.new_items)
        check_dtype(self.dtype, self.model)
        if self.split not in ("test", "validation"):
            raise ValueError(f"--split is test or validation, not {self.split!r}")
        if min(self.top_k) < 1 or self.num_beams < max(self.top_k) or self.batch_size < 1:
            raise ValueError(
                f"--top_k {' '.join(map(str, self.top_k))} with --num_beams {self.num_beams} and --batch_size {self.batch_size}: all must be at "
                "least 1, and num_beams at least the largest top_k"
            )


def evaluate(data: RecommendationDataset | DataSettings | None = None, *settings: object, **options) -> Result:
    """
    Recall, NDCG, MRR and coverage of a saved generator or sequence model on held-out items, and of the baselines. Under torchrun the ranks share the users.

    Args:
        data: a dataset, or the settings to load one. Without it, `options` name the data.
        settings: [`EvaluateSettings`], optional.
        options: single fields of them, e.g. `model="runs/mine"`, and of [`DataSettings`], e.g. `interactions="ratings.csv"`. Data options and
            `exclude_seen` that are not given are those that the model was trained with.

    Raises:
        ValueError: options that do not fit together, no model in the folder, or items of the data that its catalogue lacks.

    Example:
        >>> evaluate(model="runs/mine", interactions="ratings.csv", top_k=[10]).metrics["onerec/recall@10"]  # doctest: +SKIP
        0.21
    """
    where, options = data_and_options(data, options)
    (how,) = gather((EvaluateSettings,), settings, options)
    assert isinstance(how, EvaluateSettings)
    how.check()
    assert how.model is not None
    if "exclude_seen" not in given_options((EvaluateSettings,), settings, options):
        how.exclude_seen = excludes_seen("--model", how.model)
    elif text := differences({"exclude_seen": how.exclude_seen}, read_data_options("--model", how.model)):
        say(text)
    with settled(as_dataset(where, how.model), how.model, how.new_items) as (dataset, model):
        rows = _rows_of(model, dataset, how)
    wait()
    return Result(rows)


def _rows_of(place: str, data: RecommendationDataset, how: EvaluateSettings) -> list[dict[str, Any]]:
    """The rows of the model of a folder or Hub repository, of any kind."""
    kind = model_type(place)
    if kind == SEQUENTIAL:
        return _sequential_rows(load_sequential("--model", place), data, how)
    if kind in RANKINGS:
        model, items = load_ranking("--model", place)
        return _item_rows(
            RANKINGS[kind], items, lambda histories, k: model.recommend(histories, k, how.exclude_seen), data, how
        )
    return _generator_rows(load_processor("--model", place), load_model("--model", place, dtype=how.dtype), data, how)


def _generator_rows(
    processor: OneRecProcessor,
    model: OneRecForConditionalGeneration,
    data: RecommendationDataset,
    how: EvaluateSettings,
) -> list[dict[str, Any]]:
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    set_ranking_weights(model, how.item_score_weight)
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
        return evaluate_beside_baselines(trainer, data, how.split, how.baselines)


def _sequential_rows(
    model: SequentialRecommender,
    data: RecommendationDataset,
    how: EvaluateSettings,
) -> list[dict[str, Any]]:
    """The rows of a sequence model under the name of its architecture; the first rank ranks."""
    import torch

    assert model.items is not None
    if torch.accelerator.is_available():
        model.to(device=torch.accelerator.current_accelerator())  # pyright: ignore[reportCallIssue]
    examples = held_out(data, how.split)
    return _item_rows(
        model.config.architecture,
        model.items,
        lambda _, k: model.rank_examples(examples, k, how.exclude_seen, how.batch_size),
        data,
        how,
    )


def _item_rows(
    name: str,
    items: ItemLookup,
    rank: Callable[[list[np.ndarray], int], np.ndarray],
    data: RecommendationDataset,
    how: EvaluateSettings,
) -> list[dict[str, Any]]:
    """The rows of a model that ranks items: `rank` takes histories of item indices and k."""
    ks = tuple(how.top_k)
    if not is_first():
        return []
    examples, active = held_out(data, how.split), active_items(items)
    if how.exclude_seen and (text := str(seen_items(examples, items, active))):
        say(text)
    histories, relevant = item_indices(examples, items)
    found = Ranking.of(name, rank(histories, max(ks)), relevant)
    found.add(name, found.ranked[name], ks, len(items))
    if how.baselines:
        for row in found.rows:
            row["against"] = row["name"].replace(f"{name}/", "popularity/")
        _add_baselines(found, data, items, how.split, ks, how.exclude_seen)
    return [*found.rows, *found.unranked_rows()]


def ranking_rows(
    model, processor: OneRecProcessor, data: RecommendationDataset, use_cpu: bool, exclude_seen: bool = True
) -> list[dict[str, Any]]:
    """
    Result rows of a model in memory and of the baselines, on the test split.

    Args:
        use_cpu: as in the training arguments: the latest arguments determine how the ranks are joined.
        exclude_seen: leave out the items of a user's history.
    """
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch,
            per_device_eval_batch_size=64,
            eval_exclude_seen=exclude_seen,
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
        )
        trainer = OneRecTrainer(model, args, processing_class=processor)
        return evaluate_beside_baselines(trainer, data, "test")


@dataclass(frozen=True)
class Ranking:
    """
    What models rank for the users of a split, and how good it is.

    Args:
        rows: result rows `model/metric`; under torchrun only the first rank has them, and the arrays.
        ranked: (users, k) item indices by model, best first, -1 for none.
        relevant: (users, items) item indices of the targets, padded with -1.
        kept: (users of the split,) bool, those who can be ranked: all models are evaluated on them, and the others are counted.
    """

    rows: list[dict[str, Any]]
    ranked: dict[str, np.ndarray]
    relevant: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(cls, name: str, ranked: np.ndarray, relevant: np.ndarray) -> Ranking:
        """
        The ranking of a model for all users of a split, without rows yet.

        Raises:
            ValueError: no user can be ranked.
        """
        from onerec_hf.evaluation.metrics import rankable

        kept = rankable(ranked)
        return cls([], {name: ranked[kept]}, np.maximum(relevant, -1)[kept], kept)

    def unranked_rows(self) -> list[dict[str, Any]]:
        """A row with the number of users who cannot be ranked, where there are any."""
        count = int((~self.kept).sum())
        return [result_row("unranked_users", count, "users")] if count else []

    def histories(self, examples: datasets.Dataset, items: ItemLookup) -> list[np.ndarray]:
        """Histories as item indices of the users who can be ranked."""
        return item_indices(examples.select(np.flatnonzero(self.kept)), items)[0]

    def add(self, name: str, ranked: np.ndarray, ks: tuple[int, ...], num_items: int) -> None:
        """Adds the ranking of another model for the same users, and its rows."""
        from onerec_hf.evaluation import ranking_metrics

        self.ranked[name] = ranked
        metrics = ranking_metrics(ranked, self.relevant, ks, num_items)
        self.rows.extend(result_row(f"{name}/{metric}", value, "share") for metric, value in metrics.items())


def evaluate_beside_baselines(
    trainer: OneRecTrainer, data: RecommendationDataset, split: str, baselines: bool = True
) -> list[dict[str, Any]]:
    """The rows of `rank_beside_baselines`."""
    return rank_beside_baselines(trainer, data, split, baselines).rows


def rank_beside_baselines(
    trainer: OneRecTrainer, data: RecommendationDataset, split: str, baselines: bool = True
) -> Ranking:
    """
    The trainer's model and, with `baselines`, popularity and item-kNN on a split: full catalogue, seen items excluded as in `trainer.args`.
    Ranks share the model's users; the first rank gets the results, the others none.

    Raises:
        FloatingPointError: weights that are not finite.
    """
    args, processor = cast("OneRecTrainingArguments", trainer.args), cast("OneRecProcessor", trainer.processing_class)
    catalogue = catalogue_of(processor)
    check_finite(cast("OneRecForConditionalGeneration", trainer.model))
    args.predict_with_generate, args.prediction_loss_only = True, False  # whatever evaluations during training did
    kept: list[EvalPrediction] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        kept.append(prediction)
        return trainer.compute_ranking_metrics(prediction)

    examples = held_out(data, split)
    lengths = np.minimum([len(history) for history in examples["history"]], processor.max_history or np.inf)
    order = np.argsort(lengths, kind="stable")  # batches of equal lengths have no padding
    strategy = args.train_sampling_strategy
    # A strategy of training shuffles the users of an evaluation too.
    trainer.compute_metrics, args.train_sampling_strategy = keep, "sequential"
    with contextlib.redirect_stdout(sys.stderr):
        metrics = trainer.evaluate(cast("Any", examples.select(order)), metric_key_prefix=split)
    trainer.compute_metrics, args.train_sampling_strategy = trainer.compute_ranking_metrics, strategy
    if not is_first():
        return Ranking([], {}, np.empty((0, 0), dtype=np.int64), np.empty(0, dtype=bool))
    back = np.argsort(order)
    ranked, relevant = (np.asarray(part)[back] for part in (kept[0].predictions, kept[0].label_ids))
    found = Ranking.of("onerec", ranked, relevant)
    names = [name.removeprefix(f"{split}_") for name in metrics if "@" in name]
    found.rows.extend(
        result_row(
            f"onerec/{name}", metrics[f"{split}_{name}"], "share", against=f"popularity/{name}" if baselines else None
        )
        for name in names
    )
    if baselines:
        _add_baselines(found, data, catalogue, split, tuple(args.eval_top_k), args.eval_exclude_seen)
    found.rows.append(result_row("invalid_id_rate", metrics[f"{split}_invalid_id_rate"], "share"))
    found.rows.extend(found.unranked_rows())
    return found


def _add_baselines(
    found: Ranking, data: RecommendationDataset, items: ItemLookup, split: str, ks: tuple[int, ...], exclude_seen: bool
) -> None:
    """Adds popularity and item-kNN."""
    active = active_items(items)
    num_items = len(items) if active is None else int(active.sum())
    for name, ranked in baseline_rankings(data, items, split, max(ks), exclude_seen)[0].items():
        if name not in found.ranked:  # the model may be one of them
            found.add(name, ranked[found.kept], ks, num_items)


def active_items(items: ItemLookup) -> np.ndarray | None:
    """(items,) bool, the items that are ranked; None for all of them, as of a sequence model."""
    from onerec_hf.modeling.catalogue import ItemCatalogue

    return items.active if isinstance(items, ItemCatalogue) else None


def baseline_rankings(
    data: RecommendationDataset, items: ItemLookup, split: str, k: int, exclude_seen: bool = True
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Item indices that popularity and item-kNN rank for a split's histories, and those of the targets, (users, items) padded with -1. The
    baselines rank the active items of the catalogue, as the model does.
    """
    from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline

    histories, relevant = item_indices(held_out(data, split), items)
    sequences = data.train_sequences
    train = np.split(items.indices(sequences.item_ids), sequences.offsets[1:-1])
    rankings = {}
    for name, baseline in (("popularity", PopularityBaseline()), ("item_knn", ItemKNNBaseline())):
        fitted = baseline.fit(train, len(items))
        rankings[name] = fitted.recommend(histories, k, exclude_seen, active_items(items))
    return rankings, relevant


def item_indices(examples: datasets.Dataset, items: ItemLookup) -> tuple[list[np.ndarray], np.ndarray]:
    """Positive histories and targets as item indices; targets are (users, items), padded with -1."""
    from onerec_hf.data import positive_histories

    histories = [items.indices(history) for history in positive_histories(examples)]
    sessions = [items.indices(session) for session in examples["session"]]
    relevant = np.full((len(sessions), max(map(len, sessions))), -1)
    for row, session in zip(relevant, sessions, strict=True):
        row[: len(session)] = session
    return histories, relevant


def held_out(data: RecommendationDataset, split: str) -> datasets.Dataset:
    """The examples of "validation" or "test"."""
    return data.validation if split == "validation" else data.test
