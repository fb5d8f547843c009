"""Tables, named sources and prepared folders as the dataset of a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.artefact import RANKINGS, model_type
from onerec_hf.workflows.data_options import options_to_take, read_data_options, saved_schema, say_differences
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, ShardedDataset
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.feature_options import check_feature_options, feature_tables, options_on
from onerec_hf.workflows.settings import FEATURE_OPTIONS, DataSettings, gather, given_options
from onerec_hf.workflows.splitting import about_ties, check_holdout, read_parts, split_table

if TYPE_CHECKING:
    import pandas as pd

    from onerec_hf.data import ItemTable, PreparedFolder, RecommendationData, UserSequences
    from onerec_hf.data.tables import TableSource
    from onerec_hf.modeling.features import FeatureSchema

# Share of the positive interactions from which it is said how many are left out with rare items.
_RARE_SHARE = 0.2
_KEEPS_FEATURES = "--features none: a saved model keeps its features. Leave the option out, or train a new model"


def load_dataset(
    settings: DataSettings | None = None,
    *,
    interactions: TableSource | None = None,
    items: TableSource | None = None,
    embeddings: np.ndarray | str | None = None,
    users: TableSource | None = None,
    schema: FeatureSchema | None = None,
    model: str | None = None,
    **options,
) -> RecommendationDataset:
    """
    Reads interactions, keeps positive feedback and frequent enough items, and splits as `holdout` says; or opens a folder of
    `onerec-hf prepare`.

    Args:
        settings: the data and the cutting of examples.
        interactions: a path, a DataFrame or a `datasets.Dataset` with user, item and timestamp.
        items: the same kinds of tables, with item ids and text columns.
        embeddings: (rows of `items`, d) item embeddings, or the path of such a .npy file.
        users: the same kinds of tables, with user ids and the columns of `user_features`.
        schema: features of a saved model, which encodes the columns that it names; by default a schema is learned from the training rows.
        model: folder or Hub id of a saved model: the options that it was trained with hold for all that are not given. `settings` give them
            all.
        options: single fields of [`DataSettings`], over `settings`.

    Returns:
        An [`InMemoryDataset`], or for `prepared` a [`ShardedDataset`].

    Raises:
        ValueError: options that contradict each other; DataError: what is wrong with the data.
        TypeError: an unknown option.

    Example:
        >>> load_dataset(dataset="movielens", min_item_interactions=10).session_length  # doctest: +SKIP
        5
        >>> load_dataset(interactions="ratings.csv", model="runs/mine").max_history  # doctest: +SKIP
        20
    """
    if model is not None and settings is None:
        known = {**options, "interactions": _given(interactions, options.get("interactions"))}
        trained = read_data_options("--model", model)
        if any(name in trained for name in FEATURE_OPTIONS):
            if options.get("features") == "none":
                raise ValueError(_KEEPS_FEATURES)
            options.pop("features", None)  # the model has what auto stood for when it was trained
        options = {**options_to_take(known, trained), **options}
    given = settings
    (settings,) = gather((DataSettings,), [] if given is None else [given], options)
    assert isinstance(settings, DataSettings)
    if settings.prepared is None:
        data = load_in_memory(
            given, interactions=interactions, items=items, embeddings=embeddings, users=users, schema=schema, **options
        )
        if model is None and schema is None:  # what is positive is not a model's to choose again
            say_every_row(data)
        return data
    if settings.dataset is not None or settings.interactions is not None or interactions is not None:
        raise ValueError("pass --prepared, --interactions or --dataset; one of them")
    items, embeddings = _given(items, settings.items), _given(embeddings, settings.embeddings)
    return _open_shards(settings, settings.prepared, items, embeddings)


def load_in_memory(
    settings: DataSettings | None = None,
    *,
    interactions: TableSource | None = None,
    items: TableSource | None = None,
    embeddings: np.ndarray | str | None = None,
    users: TableSource | None = None,
    schema: FeatureSchema | None = None,
    **options,
) -> InMemoryDataset:
    """
    `load_dataset` without prepared folders: the result also has the tables (`source`), all sequences and the split.

    Raises:
        ValueError, DataError, TypeError: as `load_dataset`.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"user_id": [u for u in range(6) for _ in range(4)], "item_id": [1, 2, 3, 4] * 6, "timestamp": [0, 1, 2, 3] * 6})
        >>> dataset = load_in_memory(interactions=table, session_length=1)
        >>> dataset.counts()["training examples"], dataset.test[0]["session"]
        (6, [4])
    """
    from onerec_hf.modeling.configuration_onerec import MOST_SESSION_ITEMS

    whole = [] if settings is None else [settings]
    (settings,) = gather((DataSettings,), whole, options)
    assert isinstance(settings, DataSettings)
    interactions, items = _given(interactions, settings.interactions), _given(items, settings.items)
    embeddings, users = _given(embeddings, settings.embeddings), _given(users, settings.users)
    if settings.prepared is not None:
        raise ValueError("--prepared: this needs a table in memory; pass --interactions or --dataset")
    if settings.eval_users is not None:
        raise ValueError("--eval_users goes with --prepared")
    if (settings.dataset is None) == (interactions is None):
        raise ValueError("pass either --dataset (a named source) or --interactions (your own table)")
    check_feature_options(settings)
    reads_users = schema is not None or settings.features == "auto" or settings.user_features
    for option, value, needs, given in (
        ("--items", items, "--interactions", interactions),
        ("--embeddings", embeddings, "--items", items),
        ("--users", users, "--user_features or --features auto", reads_users),
        ("--data_dir", settings.data_dir, "--dataset", settings.dataset),
    ):
        if value is not None and given is None:
            raise ValueError(f"{option} goes with {needs}; pass both or neither")
    most = {
        "min_item_interactions": 2**31,
        "session_length": MOST_SESSION_ITEMS,
        "max_history": 2**31,
        "stride": 2**31,
    }
    for option, largest in most.items():
        if getattr(settings, option) < 1:
            raise ValueError(f"--{option} must be at least 1; got {getattr(settings, option)}")
        if getattr(settings, option) > largest:
            raise ValueError(f"--{option} must be at most {largest:,}; got {getattr(settings, option)!s:.40}")
    if settings.ties not in ("file", "shuffle"):
        raise ValueError(f"--ties {settings.ties}: choose file or shuffle")
    check_holdout(settings)
    given = frozenset(given_options((DataSettings,), whole, options))
    source, parts = _read(settings, interactions, items, embeddings, users), read_parts(settings)
    return replace(_split(source, parts, settings, schema), given=given)


def _given(value, default):
    """The argument, or the setting where there is none: tables have no truth value."""
    return default if value is None else value


def _read(
    settings: DataSettings,
    interactions: TableSource | None,
    items: TableSource | None,
    embeddings: np.ndarray | str | None,
    users: TableSource | None,
) -> RecommendationData:
    """The tables of the user, or of a named source."""
    from onerec_hf.data import load_files, load_source

    if interactions is None:
        assert settings.dataset is not None
        return load_source(settings.dataset, settings.data_dir)
    return load_files(
        interactions,
        items,
        user_column=settings.user_column,
        item_column=settings.item_column,
        timestamp_column=settings.timestamp_column,
        column_names=settings.column_names,
        item_column_names=settings.item_column_names,
        missing_items=settings.missing_items,
        embeddings=embeddings,
        users_table=users,
    )


def _split(
    source: RecommendationData, parts: list[pd.DataFrame], settings: DataSettings, schema: FeatureSchema | None
) -> InMemoryDataset:
    """Positive feedback on frequent enough items as examples."""
    from onerec_hf.data import PositiveFeedback, UserSequences
    from onerec_hf.data.feature_tables import about_features

    positive = source.positive if settings.positive is None else PositiveFeedback.parse(settings.positive)
    settings = replace(settings, positive=positive.rules or None)
    kept = [positive.holds(table) for table in (source.interactions, *parts)]
    if schema is None:
        settings = replace(settings, **options_on(settings, source, kept))
    elif settings.features == "none":
        raise ValueError(_KEEPS_FEATURES)
    features = feature_tables(source, parts, kept, settings, schema)
    if features is None:
        masked = zip((source.interactions, *parts), kept, strict=True)
        tables = [UserSequences.from_interactions(table.loc[mask]) for table, mask in masked]
    else:
        tables = features.sequences()
    sequences, split, said = split_table(tables, settings, features)
    item_ids = sequences.item_counts()[0]
    if len(item_ids) < 2:
        raise ValueError(
            f"{source.name}: {len(item_ids)} item is left, and a ranking needs at least two; add interactions with other items, or lower "
            "--min_item_interactions"
        )
    protocol = (
        f"Positive feedback: {positive}; items with fewer than {settings.min_item_interactions} positive interactions are left out. "
        f"{split.description}{about_ties(sequences, settings)}"
    )
    say(
        f"{source.name}: {sum(map(len, (source.interactions, *parts))):,} interactions; {len(sequences.item_ids):,} of them, by {len(sequences):,} users "
        f"on {len(item_ids):,} items, are kept. {protocol}"
    )
    if said:
        say(said)
    if rare := _about_rare_items(tables, item_ids, settings.min_item_interactions):
        say(rare)
    dataset = InMemoryDataset(source, sequences, split, item_ids, protocol, settings, tables=features)
    if dataset.features is None:
        return dataset
    return replace(
        dataset, protocol=protocol + about_features(dataset.features.schema, settings.history_feedback == "all")
    )


def say_every_row(data: InMemoryDataset) -> None:
    """Prints a line where every row of a table counts as positive, and a column tells some from others."""
    from onerec_hf.data.positives import about_every_row

    chosen = data.settings.dataset is not None or data.settings.positive
    if not chosen and (note := about_every_row(data.source.interactions)):
        say(note)


def _about_rare_items(tables: list[UserSequences], kept: np.ndarray, least: int) -> str:
    """A sentence where the items that are left out have much of the feedback; empty elsewhere."""
    ids = np.concatenate([table.item_ids for table in tables])
    share, items = float(np.mean(~np.isin(ids, kept))), len(np.unique(ids))
    if share < _RARE_SHARE:
        return ""
    return (
        f"--min_item_interactions {least} leaves out {items - len(kept):,} of {items:,} items, with {share:.0%} of the positive interactions: they "
        "are never recommended. A lower one keeps them."
    )


# A prepared folder has decided these, and holds out each user's last two items.
_FIXED = ("min_item_interactions", "session_length", "max_history", "stride", "positive")
_IN_MEMORY = ("ties", "holdout", "validation_start", "test_start", "validation_interactions", "test_interactions")


def _open_shards(
    settings: DataSettings, path: str, items: TableSource | None, embeddings: np.ndarray | str | None
) -> ShardedDataset:
    from onerec_hf.data import PreparedFolder

    if settings.eval_users is not None and settings.eval_users < 1:
        raise ValueError(f"--eval_users must be at least 1; got {settings.eval_users}")
    folder = PreparedFolder(path)
    defaults = {each.name: each.default for each in fields(DataSettings)}
    for name in _FIXED:
        given, decided = getattr(settings, name), folder.settings[name]
        if given not in (defaults[name], decided):
            raise ValueError(
                f"--{name} {given if isinstance(given, int) else ' '.join(given)}: {path} was prepared with {decided or 'none'}; leave "
                "the option out, or prepare the log again"
            )
    for name in _IN_MEMORY:
        if getattr(settings, name) != defaults[name]:
            raise ValueError(
                f"--{name} goes with --interactions: a prepared folder holds out each user's last two items"
            )
    # What the folder has anyway may be named.
    same = {"features": "none", "history_feedback": folder.settings.get("history_feedback", "positive")}
    if folder.features is not None:
        del same["features"]
    for name in ("users", "features", *FEATURE_OPTIONS):
        if getattr(settings, name) not in (defaults[name], same.get(name)):
            raise ValueError(
                f"--{name} goes with --interactions; what a prepared folder holds was chosen by `onerec-hf prepare`"
            )
    if items is None and embeddings is not None:
        raise ValueError("--embeddings goes with --items; pass both or neither")
    if settings.missing_items != "error":
        raise ValueError("--missing_items goes with --interactions: a prepared folder has its examples already")
    table = None if items is None else _items_of(folder, items, settings, embeddings)
    dataset = ShardedDataset(folder, table, settings.eval_users)
    say(
        f"{path}: {folder.counts['rows']:,} interactions; {folder.counts['kept']:,} of them, by {folder.counts['users']:,} users on "
        f"{folder.counts['items']:,} items, are kept, in {len(folder.train_files):,} shards. {folder.protocol}"
    )
    return dataset


def _items_of(
    folder: PreparedFolder, items: TableSource, settings: DataSettings, embeddings: np.ndarray | str | None
) -> ItemTable:
    """The items table of a prepared folder, which has a row for each of its items."""
    from onerec_hf.data import read_items
    from onerec_hf.data.columns import about
    from onerec_hf.data.sources import with_text

    names = settings.item_column_names
    table = read_items(items, item_column=settings.item_column, embeddings=embeddings, column_names=names)
    with about(items):
        table = table.with_ids_like(folder.item_ids)
        table.select(folder.item_ids)  # raises where an item has no row
        return with_text(table)


def data_and_options(
    data: RecommendationDataset | DataSettings | None, options: dict[str, Any]
) -> tuple[RecommendationDataset | DataSettings | Mapping[str, Any], dict[str, Any]]:
    """
    The data of a workflow, which its single options describe where there is neither a dataset nor settings, and the other options.

    Raises:
        TypeError: options of the data beside a dataset or settings.
    """
    names = {each.name for each in fields(DataSettings)}
    of_data = {name: value for name, value in options.items() if name in names}
    if data is not None and of_data:
        raise TypeError(
            f"option {next(iter(of_data))!r} is of the data: pass it to load_dataset, or leave the dataset out"
        )
    return of_data if data is None else data, {name: value for name, value in options.items() if name not in names}


def as_dataset(
    data: RecommendationDataset | DataSettings | Mapping[str, Any], model: str | None = None, option: str = "--model"
) -> RecommendationDataset:
    """
    The dataset itself, or the one that settings or single options describe.

    Args:
        data: of single options those that the user gave; for the others those of the model hold.
        model: folder or Hub id of a saved model. It is said where the options of the data differ from those that it was trained with.
        option: where the model comes from, for messages.
    """
    trained = {} if model is None else read_data_options(option, model)
    schema = None if model is None else saved_schema(option, model)
    if isinstance(data, Mapping):
        dataset = load_dataset(**data, schema=schema, model=model)
    elif isinstance(data, DataSettings):
        if data.features == "auto" and data.history_feedback is None and data.prepared is None:
            data = replace(data, history_feedback=trained.get("history_feedback"))  # what auto stood for
        dataset = load_dataset(data, schema=schema, model=model)
    elif schema is not None and isinstance(data, InMemoryDataset):
        dataset = data.with_schema(schema)
    else:
        dataset = data
    # Popularity and item-kNN rank by the positive interactions of any dataset.
    may_differ = model is None or model_type(model) in RANKINGS
    if not may_differ and (dataset.features is None) != (schema is None):
        raise ValueError(
            f"{option} {model}: "
            + (
                "the model reads no features; leave out the options of features"
                if schema is None
                else "the model reads features, and the data has none; load it with the features"
            )
        )
    if schema is not None and dataset.features is not None and dataset.features.schema != schema:
        raise ValueError(
            f"{option} {model}: the folder of --prepared has features of its own; train a new model on it, or read the log with --interactions"
        )
    say_differences(dataset, trained)
    return dataset
