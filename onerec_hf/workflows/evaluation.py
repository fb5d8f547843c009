"""A saved or trained generator ranks the whole catalogue for held-out items, beside popularity and item-kNN."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.evaluation.results import result_row
from onerec_hf.workflows.artefact import load_model, load_processor, set_item_score_weight
from onerec_hf.workflows.dataset import RecommendationDataset, check_catalogue
from onerec_hf.workflows.distributed import is_first, joined_on_cpu, wait
from onerec_hf.workflows.loading import as_dataset
from onerec_hf.workflows.results import Result
from onerec_hf.workflows.settings import DataSettings, gather

if TYPE_CHECKING:
    import datasets

    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments


@dataclass
class EvaluateSettings:
    """What is evaluated and how."""

    model: str | None = field(default=None, metadata={"help": "A saved OneRec: folder or Hub id."})
    split: str = field(default="test", metadata={"help": "test or validation."})
    top_k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "The k of the metrics."})
    num_beams: int = field(default=50, metadata={"help": "Beams per user; at least the largest k."})
    exclude_seen: bool = field(default=True, metadata={"help": "Leave out the items of a user's history."})
    baselines: bool = field(
        default=True,
        metadata={
            "help": "Rank with popularity and item-kNN beside the model; they hold all training sequences in memory."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    item_score_weight: float | None = field(
        default=None, metadata={"help": "Weight of the item head's scores; the model's own when not given."}
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: no model, an unknown split, or numbers that do not fit together.
        """
        if self.model is None:
            raise ValueError("give --model: the folder or Hub id of a saved OneRec")
        if self.split not in ("test", "validation"):
            raise ValueError(f"--split is test or validation, not {self.split!r}")
        if min(self.top_k) < 1 or self.num_beams < max(self.top_k) or self.batch_size < 1:
            raise ValueError(
                f"--top_k {' '.join(map(str, self.top_k))} with --num_beams {self.num_beams} and --batch_size {self.batch_size}: all must be at "
                "least 1, and num_beams at least the largest top_k"
            )


def evaluate(data: RecommendationDataset | DataSettings, *settings: object, **options) -> Result:
    """
    Recall, NDCG, MRR and coverage of a saved model on held-out items, and of the baselines. Under torchrun the ranks share the users.

    Args:
        data: a dataset, or the settings to load one.
        settings: [`EvaluateSettings`], optional.
        options: single fields of them, e.g. `model="runs/mine"`.

    Raises:
        ValueError: options that do not fit together, no model at the place, or items of the data that its catalogue lacks.

    Example:
        >>> evaluate(dataset, model="runs/mine", top_k=[10]).metrics["onerec/recall@10"]  # doctest: +SKIP
        0.21
    """
    (how,) = gather((EvaluateSettings,), settings, options)
    assert isinstance(how, EvaluateSettings)
    how.check()
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    assert how.model is not None
    processor, model = load_processor("--model", how.model), load_model("--model", how.model)
    set_item_score_weight(model, how.item_score_weight)
    dataset = as_dataset(data)
    check_catalogue(f"--model {how.model}", processor, dataset)
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
        rows = evaluate_beside_baselines(trainer, dataset, how.split, how.baselines)
    wait()
    return Result(rows)


def ranking_rows(
    model, processor: OneRecProcessor, data: RecommendationDataset, use_cpu: bool
) -> list[dict[str, Any]]:
    """
    Result rows of a model in memory on the test split, beside the baselines.

    Args:
        use_cpu: as in the arguments of the training: the last arguments that are made decide how the ranks are joined.
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
    `trainer.args` say. Ranks share the model's users; the first rank gets the rows, the others none.
    """
    from onerec_hf.evaluation import ranking_metrics

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
    ks, scores = tuple(args.eval_top_k), {}
    if baselines:
        rankings, relevant = baseline_rankings(data, catalogue, split, max(ks), args.eval_exclude_seen)
        scores = {name: ranking_metrics(ranked, relevant, ks, len(catalogue)) for name, ranked in rankings.items()}
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
    rows += [
        result_row(f"{name}/{metric}", value, "share")
        for name, values in scores.items()
        for metric, value in values.items()
    ]
    rows.append(result_row("invalid_id_rate", metrics[f"{split}_invalid_id_rate"], "share"))
    return rows


def baseline_rankings(
    data: RecommendationDataset, catalogue: ItemCatalogue, split: str, k: int, exclude_seen: bool = True
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Item indices that popularity and item-kNN rank for a split's histories, and those of the targets, (users, items) padded with -1. The
    baselines rank the whole catalogue, as the model does.
    """
    from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline

    examples = held_out(data, split)
    histories = [catalogue.rows(history) for history in examples["history"]]
    sessions = [catalogue.rows(session) for session in examples["session"]]
    relevant = np.full((len(sessions), max(map(len, sessions))), -1)
    for row, session in zip(relevant, sessions, strict=True):
        row[: len(session)] = session
    sequences = data.train_sequences
    train = np.split(catalogue.rows(sequences.item_ids), sequences.offsets[1:-1])
    rankings = {}
    for name, baseline in (("popularity", PopularityBaseline()), ("item_knn", ItemKNNBaseline())):
        rankings[name] = baseline.fit(train, len(catalogue)).recommend(histories, k, exclude_seen)
    return rankings, relevant


def held_out(data: RecommendationDataset, split: str) -> datasets.Dataset:
    """The examples of "validation" or "test"."""
    return data.validation if split == "validation" else data.test
