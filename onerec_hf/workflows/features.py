"""Features and lifelong histories in the workflows: those of a dataset for a processor, and how much each feature is worth to a trained model."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.evaluation.results import result_row
from onerec_hf.workflows.artefact import catalogue_of
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, sample
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.semantic_ids import embed_items
from onerec_hf.workflows.settings import sizes_of_lifelong

if TYPE_CHECKING:
    from collections.abc import Sequence

    import datasets

    from onerec_hf.data import DatasetFeatures
    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.modeling.lifelong_history import LifelongHistory
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
    from onerec_hf.workflows.settings import ModelSettings, SemanticIDSettings

#: Held-out users of the permutations, at most.
WORTH_USERS = 1000


def set_features(processor: OneRecProcessor, data: RecommendationDataset) -> None:
    """Gives a processor the features of a dataset; items of its catalogue that the data does not hold have missing values."""
    if (found := of_catalogue(data, catalogue_of(processor))) is not None:
        processor.set_features(found.schema, found.items)


def of_catalogue(data: RecommendationDataset, catalogue: ItemCatalogue) -> DatasetFeatures | None:
    """A dataset's features with its items in the order of a catalogue; None where it has none."""
    if data.features is None:
        return None
    schema = data.features.schema
    codes = np.repeat(schema.encode_items([{}]), len(catalogue), axis=0)
    codes[catalogue.indices(data.item_ids)] = data.features.items
    return replace(data.features, items=codes)


def lifelong_history(
    data: RecommendationDataset, ids: SemanticIDSettings, settings: ModelSettings, processor: OneRecProcessor
) -> LifelongHistory | None:
    """
    What compresses histories for `--lifelong`: by the embeddings that semantic IDs are fitted on, zeros for items that the data does not hold; None without
    the option. The examples of a prepared folder are cut already: the oldest `longest` interactions of them are the pathway's.

    Raises:
        ValueError: a prepared folder whose histories are not longer than that.
    """
    from onerec_hf.modeling.lifelong_history import LifelongHistory

    if (sizes := sizes_of_lifelong(settings.lifelong)) is None:
        return None
    if not isinstance(data, InMemoryDataset):
        if sizes["longest"] >= data.max_history:
            raise ValueError(
                f"--lifelong longest={sizes['longest']}: the histories of --prepared hold {data.max_history} interactions; prepare with a larger "
                "--max_history, or pass a smaller longest"
            )
        processor.max_history = data.max_history - sizes["longest"]
    found, catalogue = embed_items(data, ids).vectors, catalogue_of(processor)
    vectors = np.zeros((len(catalogue), found.shape[1]), np.float16)
    vectors[catalogue.indices(data.item_ids)] = found
    pools = settings.encoder_pools_items and settings.architecture == "onerec"
    return LifelongHistory(vectors, sizes["items"], sizes["queries"], sizes["longest"], pools)


@dataclass(frozen=True)
class Worth:
    """
    What one feature is worth: the metric without its values is lower by so much.

    Args:
        side: user, interaction or item.
        name: of the feature.
        loss: mean over users of the metric minus that with the feature's values shuffled.
        error: standard error of it over the users.
    """

    side: str
    name: str
    loss: float
    error: float

    def row(self, metric: str) -> dict[str, Any]:
        """For `results.json`; the spread is two standard errors to both sides."""
        spread = [self.loss - 2 * self.error, self.loss + 2 * self.error]
        return result_row(f"feature_worth/{self.side}/{self.name}", self.loss, metric, spread=spread)


def feature_worth(
    trainer: OneRecTrainer, data: RecommendationDataset, seed: int = 0, users: int = WORTH_USERS
) -> list[Worth]:
    """
    Permutation importance of each feature of a trained model: NDCG on a sample of validation users, minus that with the feature's values shuffled, those of
    users between users, of interactions between all interactions, of items between items. Empty for a model without features.

    Args:
        users: of the sample, at most; 0 measures nothing.

    A feature whose value another one repeats is worth nothing by this: the model still reads the other one.

    Example:
        >>> feature_worth(result.trainer, dataset)[0]  # doctest: +SKIP
        Worth(side='user', name='age', loss=0.0021, error=0.0008)
    """
    processor = cast("OneRecProcessor", trainer.processing_class)
    schema = processor.features
    if schema is None or not users:
        return []
    examples = sample(data.validation, users, seed)
    say(f"how much {len(schema.all)} features are worth to {len(examples):,} users")
    whole, found = _gains(trainer, examples), []
    for side in ("user", "interaction", "item"):
        slot = 0
        for feature in getattr(schema, side):
            slots = slice(slot, slot + feature.slots)
            slot = slots.stop
            random = np.random.default_rng(seed)
            with _shuffled(processor, side, slots, random):
                shuffled = _shuffled_column(examples, side, slots, getattr(schema, f"{side}_slots"), random)
                lost = whole - _gains(trainer, shuffled)
            error = float(lost.std(ddof=1) / np.sqrt(len(lost))) if len(lost) > 1 else 0.0
            found.append(Worth(side, feature.key, float(lost.mean()), error))
    return sorted(found, key=lambda worth: -worth.loss)


@contextlib.contextmanager
def _shuffled(processor: OneRecProcessor, side: str, slots: slice, random: np.random.Generator):
    """A processor whose items have shuffled values of a feature; it has its own again afterwards."""
    if side != "item":
        yield
        return
    before = processor.item_features
    assert before is not None
    codes = before.copy()
    codes[:, slots] = codes[random.permutation(len(codes)), slots]
    processor.item_features = codes
    try:
        yield
    finally:
        processor.item_features = before


def _shuffled_column(
    examples: datasets.Dataset, side: str, slots: slice, width: int, random: np.random.Generator
) -> datasets.Dataset:
    """Examples whose users or interactions have shuffled values of a feature."""
    import pyarrow as pa
    from datasets import Dataset

    name = {"user": "user_features", "interaction": "history_features"}.get(side)
    if name is None:
        return examples
    lists = [np.asarray(row, dtype=np.int32).reshape(-1, width) for row in examples[name]]
    flat = np.concatenate(lists)
    flat[:, slots] = flat[random.permutation(len(flat)), slots]
    parts = np.split(flat, np.cumsum([len(each) for each in lists])[:-1])
    table: pa.Table = examples.with_format("arrow")[:]
    at = table.column_names.index(name)
    column = pa.array([part.ravel() for part in parts], table.schema.field(at).type)
    return Dataset(table.set_column(at, name, column))


def _gains(trainer: OneRecTrainer, examples: datasets.Dataset) -> np.ndarray:
    """(users,) NDCG at 10, or at the largest k of the evaluation."""
    args = cast("OneRecTrainingArguments", trainer.args)
    return per_user(trainer, examples)[f"ndcg@{worth_k(args.eval_top_k)}"]


def per_user(trainer: OneRecTrainer, examples: datasets.Dataset) -> dict[str, np.ndarray]:
    """
    NDCG and recall of a trainer's model on each user of examples, at 10 or at the largest k of the evaluation; 0 for users who cannot be ranked.

    Example:
        >>> per_user(result.trainer, dataset.test)["ndcg@10"].mean()  # doctest: +SKIP
        0.0402
    """
    from onerec_hf.evaluation import ndcg_at_k, recall_at_k

    args, before = cast("OneRecTrainingArguments", trainer.args), trainer.compute_metrics
    kept: list[Any] = []

    def keep(prediction) -> dict[str, float]:
        kept.append(prediction)
        return {}

    args.predict_with_generate, args.prediction_loss_only = True, False  # whatever evaluations during training did
    strategy, args.train_sampling_strategy = args.train_sampling_strategy, "sequential"  # it would shuffle users
    trainer.compute_metrics = keep
    try:
        with contextlib.redirect_stdout(sys.stderr):
            trainer.evaluate(cast("Any", examples), metric_key_prefix="worth")
    finally:
        trainer.compute_metrics, args.train_sampling_strategy = before, strategy
    ranked, relevant, k = kept[0].predictions, np.maximum(kept[0].label_ids, -1), worth_k(args.eval_top_k)
    metrics = {"ndcg": ndcg_at_k, "recall": recall_at_k}
    return {f"{name}@{k}": np.asarray(metric(ranked, relevant, k, per_row=True)) for name, metric in metrics.items()}


def worth_k(ks: Sequence[int]) -> int:
    """The k of the NDCG that features are measured by."""
    return 10 if 10 in ks else max(ks)
