"""The data of a workflow: a table in memory or a prepared folder of shards, as one protocol."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import FEATURE_OPTIONS, DataSettings, data_options
from onerec_hf.workflows.splitting import about_ties, split_by_time, split_last, split_table

if TYPE_CHECKING:
    import datasets

    from onerec_hf.data import (
        DatasetFeatures,
        ExampleStream,
        ItemTable,
        PreparedFolder,
        RecommendationData,
        Split,
        UserSequences,
    )
    from onerec_hf.data.feature_tables import FeatureTables
    from onerec_hf.modeling.features import FeatureSchema


class RecommendationDataset(Protocol):
    """
    Interactions as training and held-out examples, and their items. Examples have the columns `user_id`, `history` and
    `session`; `session_length` and `max_history` are those of the training examples.
    """

    @property
    def name(self) -> str:
        """Short name, for results and cards."""
        ...

    @property
    def description(self) -> str:
        """Origin and licence, for cards."""
        ...

    @property
    def protocol(self) -> str:
        """How the data was filtered and split, sentences with counts."""
        ...

    @property
    def items(self) -> ItemTable | None:
        """The items table with a column `text`; None without item data."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """The options that the examples were made with, by their names in [`~onerec_hf.workflows.DataSettings`]; no paths."""
        ...

    @property
    def item_ids(self) -> np.ndarray:
        """(items,) ids of the items that are kept, sorted."""
        ...

    @property
    def features(self) -> DatasetFeatures | None:
        """Schema and items' codes; None where the examples have no features."""
        ...

    @property
    def session_length(self) -> int: ...

    @property
    def max_history(self) -> int: ...

    @property
    def train(self) -> datasets.Dataset | ExampleStream:
        """Training examples."""
        ...

    @property
    def validation(self) -> datasets.Dataset:
        """One example per user: the last item but one, or the items of a validation period."""
        ...

    @property
    def test(self) -> datasets.Dataset:
        """One example per user: the last item, or the items of a test period."""
        ...

    @property
    def train_sequences(self) -> UserSequences:
        """All training sequences, in memory."""
        ...

    def counts(self) -> dict[str, int]:
        """Counts of the data, for cards."""
        ...

    def train_rows(self) -> list[np.ndarray]:
        """Training sequences as indices into `item_ids`."""
        ...


@dataclass(frozen=True, eq=False)
class InMemoryDataset:
    """
    A table in memory; [`~onerec_hf.workflows.loading.load_in_memory`] makes it.

    Args:
        source: the tables as they were read.
        sequences: each user's positive interactions with frequent enough items.
        split: training and held-out examples of them.
        item_ids: (items,) sorted.
        protocol: how the data was filtered and split.
        settings: how the examples were cut; `positive` holds the rules that were applied, also those of a named source.
        given: the fields of `settings` that the caller chose; `train` may choose the others from the data.
        trained: (users,) items at the beginning of each user's sequence that are targets no more, where training goes on from a model.
        tables: the columns of features; None where there are none.
    """

    source: RecommendationData
    sequences: UserSequences
    split: Split
    item_ids: np.ndarray
    protocol: str
    settings: DataSettings
    given: frozenset[str] = frozenset()
    trained: np.ndarray | None = None
    tables: FeatureTables | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def options(self) -> dict[str, Any]:
        options = {each.name: getattr(self.settings, each.name) for each in data_options()}
        return with_features(options, self._schema)

    @property
    def features(self) -> DatasetFeatures | None:
        return self._features

    @cached_property
    def _features(self) -> DatasetFeatures | None:
        from onerec_hf.data import DatasetFeatures

        if self.tables is None or self._schema is None:
            return None
        return DatasetFeatures(self._schema, self.tables.item_codes(self._schema, self.item_ids))

    @property
    def _schema(self) -> FeatureSchema | None:
        events = self.sequences.events
        return None if events is None or events.schema is None or not events.schema.slots else events.schema

    def with_schema(self, schema: FeatureSchema) -> InMemoryDataset:
        """
        The dataset with features as a saved model has them, in place of those that were learned from its rows.

        Raises:
            ValueError: a dataset without features, or one that goes on from a model.
            DataError: a column that a table lacks, or that is of another type.
        """
        if self.tables is None:
            raise ValueError("the model reads features, and the data has none; load it with the features")
        if self._schema == schema:
            return self
        tables = replace(self.tables, schema=schema)
        sequences, split, said = split_table(tables.sequences(), self.settings, tables)
        if said:
            say(said)
        return replace(self, sequences=sequences, split=split, tables=tables)

    @property
    def description(self) -> str:
        return self.source.description

    @property
    def items(self) -> ItemTable | None:
        return self.source.items

    @property
    def session_length(self) -> int:
        return self.settings.session_length

    @property
    def max_history(self) -> int:
        return self.settings.max_history

    @property
    def train(self) -> datasets.Dataset:
        return self.split.train

    @property
    def validation(self) -> datasets.Dataset:
        return self.split.validation

    @property
    def test(self) -> datasets.Dataset:
        return self.split.test

    @property
    def train_sequences(self) -> UserSequences:
        return self.split.train_sequences

    def counts(self) -> dict[str, int]:
        return {
            "interactions": len(self.source.interactions),
            "of them kept": len(self.sequences.item_ids),
            "users": len(self.sequences),
            "items": len(self.item_ids),
            "training examples": len(self.train),
            "validation examples": len(self.validation),
            "test examples": len(self.test),
        }

    def train_rows(self) -> list[np.ndarray]:
        return _rows(self.train_sequences, self.item_ids)

    def cut(self, **options: int) -> InMemoryDataset:
        """
        The dataset with training examples of other sizes; validation and test users stay.

        Args:
            options: `session_length`, `max_history` or `stride`.

        Example:
            >>> dataset.cut(session_length=1, max_history=20).session_length  # doctest: +SKIP
            1
        """
        from onerec_hf.data.splits import describe_windows, train_windows

        settings = replace(self.settings, **options)
        before, after = ((each.session_length, each.max_history, each.stride) for each in (self.settings, settings))
        train = train_windows(self.train_sequences, *after)
        description = self.split.description.replace(
            describe_windows(len(self.train), *before), describe_windows(len(train), *after)
        )
        split = replace(self.split, train=train, description=description)
        return replace(self, split=split, settings=settings, protocol=self._protocol(description))

    def with_older(self, longest: int) -> InMemoryDataset:
        """
        The dataset with windows whose histories hold up to `longest` interactions more than `max_history`, for a lifelong pathway.

        Raises:
            ValueError: training examples are prefixes, or the windows would not fit into half of this machine's memory.
        """
        from onerec_hf.data import window_examples

        if "history_lengths" in self.train.column_names:
            raise ValueError("a lifelong pathway reads one history per target: train on windows (--train_on windows)")
        settings = self.settings
        most = settings.max_history + longest
        _check_windows(self.train_sequences.lengths, most, settings.stride)
        train = window_examples(
            self.train_sequences,
            settings.session_length,
            most,
            settings.stride,
            self.trained,
        )
        return replace(self, split=replace(self.split, train=train))

    def with_shuffled_ties(self) -> InMemoryDataset:
        """
        The dataset with `ties="shuffle"`, split leave-one-out: a user's rows of equal time are in random order, and the split is made of
        these sequences.
        """
        settings = replace(self.settings, ties="shuffle")
        sequences, split, _ = split_last(self.sequences.shuffled_ties(settings.ties_seed), settings, self.tables)
        protocol = self._protocol(split.description)
        if before := about_ties(self.sequences, self.settings):
            protocol = protocol.replace(before, "")
        protocol += about_ties(sequences, settings)
        return replace(self, sequences=sequences, split=split, settings=settings, protocol=protocol)

    def where(self, keep: np.ndarray, note: str) -> InMemoryDataset:
        """
        The dataset with the rows where `keep`, a mask of the sequences' rows, is true; split anew, by time at the same times.

        Args:
            note: sentence for the protocol.

        Raises:
            DataError: no user is left with items to hold out.
            ValueError: a given split, whose tables are not kept.
        """
        settings, sequences = self.settings, self.sequences.where(keep)
        if settings.holdout == "given":
            raise ValueError(
                "--holdout given: leave items that the model does not hold out of the three tables, or pass --new_items add"
            )
        sequences = sequences.reading(sequences.item_counts()[0])
        if settings.holdout == "temporal":
            split = split_by_time(sequences, settings, self.sequences.timestamps)
        else:
            split = split_last(sequences, settings)[1]  # codes of features stay
        return replace(
            self,
            sequences=sequences,
            split=split,
            item_ids=sequences.item_counts()[0],
            protocol=f"{self._protocol(split.description)} {note}",
        )

    def _protocol(self, description: str) -> str:
        """The protocol with another description of the split."""
        return self.protocol.replace(self.split.description, description)

    def on_prefixes(self) -> InMemoryDataset:
        """The dataset with each training history once, for all the sessions that follow its prefixes, in place of windows."""
        from onerec_hf.data import prefix_examples

        prefixes = prefix_examples(
            self.train_sequences, self.session_length, self.max_history, self.settings.stride, self.trained
        )
        note = (
            f" The windows are read as {len(prefixes):,} histories, each once for all its sessions; beyond {self.max_history} items a session "
            f"reads the latest {self.max_history - self.max_history // 2 + 1} to {self.max_history}."
        )
        return replace(self, split=replace(self.split, train=prefixes), protocol=self.protocol + note)


@dataclass(frozen=True, eq=False)
class ShardedDataset:
    """
    A folder of `onerec-hf prepare`: training examples are streamed, sequences are read on first use.

    Args:
        folder: the prepared folder.
        items: the items table; None without item data.
        eval_users: held-out users, a random sample; all by default.
    """

    folder: PreparedFolder
    items: ItemTable | None = None
    eval_users: int | None = None

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def description(self) -> str:
        files = self.folder.manifest["source"]
        return f"Read from {files[0]}" + (f" and {len(files) - 1:,} more files." if len(files) > 1 else ".")

    @property
    def protocol(self) -> str:
        return self.folder.protocol

    @property
    def options(self) -> dict[str, Any]:
        from onerec_hf.data import PositiveFeedback

        decided = {each.name: self.folder.settings.get(each.name, each.default) for each in data_options()}
        schema = None if self.features is None else self.features.schema
        return with_features(decided | {"positive": PositiveFeedback(decided["positive"]).rules or None}, schema)

    @property
    def item_ids(self) -> np.ndarray:
        return self.folder.item_ids

    @property
    def features(self) -> DatasetFeatures | None:
        return self.folder.features

    @property
    def session_length(self) -> int:
        return int(self.folder.settings["session_length"])

    @property
    def max_history(self) -> int:
        return int(self.folder.settings["max_history"])

    @property
    def train(self) -> ExampleStream:
        return self._train

    @property
    def validation(self) -> datasets.Dataset:
        return self._validation

    @property
    def test(self) -> datasets.Dataset:
        return self._test

    # Read once, on first use: trainers identify data sets by identity.
    @cached_property
    def _train(self) -> ExampleStream:
        return self.folder.train()

    @cached_property
    def _validation(self) -> datasets.Dataset:
        return self.folder.held_out("validation", self.eval_users)

    @cached_property
    def _test(self) -> datasets.Dataset:
        return self.folder.held_out("test", self.eval_users)

    @property
    def train_sequences(self) -> UserSequences:
        return self.folder.train_sequences

    def counts(self) -> dict[str, int]:
        counts = self.folder.counts
        return {
            "interactions": counts["rows"],
            "of them kept": counts["kept"],
            "users": counts["users"],
            "items": counts["items"],
            "training examples": counts["train"],
            "validation examples": counts["validation"],
            "test examples": counts["test"],
        }

    def train_rows(self) -> list[np.ndarray]:
        return _rows(self.train_sequences, self.item_ids)


def with_features(options: dict[str, Any], schema: FeatureSchema | None) -> dict[str, Any]:
    """
    Options of data with the columns of a schema by name; without features none of theirs, so that they are those of earlier versions.

    Example:
        >>> from onerec_hf.modeling.features import Feature, FeatureSchema
        >>> schema = FeatureSchema(user=(Feature("age", edges=(30.0,)),))
        >>> with_features({"stride": 1, "user_features": ["auto"], "item_features": None, "history_feedback": "positive"}, schema)
        {'stride': 1, 'user_features': ['age']}
    """
    named = {} if schema is None else named_features(schema)
    feedback = options.get("history_feedback")
    features = {"history_feedback": feedback} if feedback not in (None, "positive") else {}
    features |= {name: columns for name, columns in named.items() if columns}
    return {name: value for name, value in options.items() if name not in FEATURE_OPTIONS} | features


def named_features(schema: FeatureSchema) -> dict[str, list[str]]:
    """The options that name the columns of a schema."""
    from onerec_hf.data.feature_tables import columns_of

    return {f"{side}_features": columns_of(schema, side) for side in ("user", "item", "interaction")}


def _check_windows(lengths: np.ndarray, longest: int, stride: int) -> None:
    """
    Raises:
        ValueError: windows of histories of up to `longest` items would take more than half of this machine's memory (8 bytes an item; features come on top).
    """
    # The histories of a user of n interactions have 1, 2, ... n - 1 items, at most `longest`.
    before = np.maximum(lengths.astype(np.float64) - 1, 0)
    full = np.maximum(before - longest, 0)
    items = float(np.sum((before - full) * (before - full + 1) / 2 + full * longest)) / stride
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 8 * items > memory / 2:
        raise ValueError(
            f"--lifelong: the histories of all windows hold {items:,.0f} items, {8 * items / 2**30:,.0f} GiB of {memory / 2**30:,.0f}; lower longest, "
            "raise --stride, or prepare the log (onerec-hf prepare) and pass --prepared"
        )


def _rows(sequences: UserSequences, item_ids: np.ndarray) -> list[np.ndarray]:
    """The sequences as indices into the sorted ids."""
    return np.split(np.searchsorted(item_ids, sequences.item_ids), sequences.offsets[1:-1])


def sample(examples: datasets.Dataset, count: int | None, seed: int = 0) -> datasets.Dataset:
    """
    At most this many examples in their order, drawn at random, the same for the same seed; all of them for None.

    Example:
        >>> from datasets import Dataset
        >>> sample(Dataset.from_dict({"user_id": list(range(100))}), 3)["user_id"][:]
        [51, 63, 83]
    """
    if count is None or count >= len(examples):
        return examples
    return examples.select(np.sort(np.random.default_rng(seed).choice(len(examples), count, replace=False)))


def drawn_examples(examples: Any, count: int | None, seed: int) -> datasets.Dataset:
    """As [`sample`]. Shards are read as one data set: what refers to rows by number needs that."""
    from datasets import Dataset

    from onerec_hf.data import ExampleStream

    if isinstance(examples, ExampleStream):
        files: Any = examples.files  # its annotation wants paths of one class
        examples = Dataset.from_parquet(files, columns=examples.column_names)
    return sample(examples, count, seed)


class ItemLookup(Protocol):
    """The items of a model: a [`~onerec_hf.ItemCatalogue`], or the item index of a sequence model."""

    def __len__(self) -> int: ...

    def indices(self, item_ids: Iterable, unknown: str = "error") -> np.ndarray:
        """Item indices; with "mask" -1 for unknown ids."""
        ...


def check_catalogue(option: str, catalogue: ItemLookup, data: RecommendationDataset, may_choose: bool = False) -> None:
    """
    Checks that the catalogue of a model holds every item of the data.

    Args:
        option: where the catalogue comes from, for the message.
        may_choose: whether the command has `--new_items`, for the message.

    Raises:
        ValueError: items are missing (how many, the first three), or ids are of the other type.
    """
    cure = (
        "pass the data, and the options for it, that the catalogue was made with (--min_item_interactions, --positive)"
    )
    try:
        unknown = catalogue.indices(data.item_ids, unknown="mask") < 0
    except TypeError as error:
        raise ValueError(f"{option}: {error} in the data; {cure}") from error
    if unknown.any():
        raise ValueError(
            f"{option}: {int(unknown.sum())} of {len(data.item_ids)} items of the data are not in its catalogue of {len(catalogue)} "
            f"items, e.g. {data.item_ids[unknown][:3].tolist()}; {'pass --new_items skip or add, or ' if may_choose else ''}{cure}"
        )
