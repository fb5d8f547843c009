"""New interactions counted into a saved model, without training: the neighbour lists of its evidence, and the popularity of its catalogue."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.trainers.folder_lock import LOCK
from onerec_hf.workflows.artefact import (
    SEQUENTIAL,
    catalogue_of,
    load_model,
    load_processor,
    load_sequential,
    model_type,
)
from onerec_hf.workflows.data_options import read_data_options
from onerec_hf.workflows.evidence import rows_of_items
from onerec_hf.workflows.run_folder import check_folder, own_folder
from onerec_hf.workflows.settings import gather

if TYPE_CHECKING:
    import pandas as pd

    from onerec_hf.data.tables import TableSource
    from onerec_hf.workflows.dataset import ItemLookup

#: What was counted into the model of a folder after its training.
UPDATES_NAME = "updates.json"


@dataclass
class UpdateSettings:
    """The model, the columns of the tables, and the output folder."""

    model: str | None = field(
        default=None, metadata={"help": "A saved OneRec, or a SASRec, HSTU, GRU4Rec or ACVAE: folder or Hub id."}
    )
    user_column: str = field(default="user_id", metadata={"help": "Name of the user column."})
    item_column: str = field(default="item_id", metadata={"help": "Name of the item column."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Name of the time column."})
    column_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the columns of --interactions and --history, a text file without a header, in order."
        },
    )
    positive: list[str] | None = field(
        default=None, metadata={"help": "Positive feedback, e.g. 'rating>=4' 'like>=1' (any of them)."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the updated model; by default the model's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in --output_dir."})


@dataclass(frozen=True)
class UpdateResult:
    """
    The folder of the updated model, and what was counted.

    Args:
        folder: with `updates.json`.
        counts: `rows` of the table and `positive` ones of them; `unknown_rows` of them with `unknown_items` that the model does not hold, left out;
            `interactions` and `pairs` of directly following items that were added; `cut`, neighbours that fell out of full lists.
        notes: what was left out and why, sentences.

    Example:
        >>> UpdateResult(Path("runs/mine"), {"interactions": 3}, []).counts["interactions"]
        3
    """

    folder: Path
    counts: dict[str, int]
    notes: list[str]


def update(
    interactions: TableSource, *settings: object, history: TableSource | None = None, **options
) -> UpdateResult:
    """
    Counts new interactions into a saved model without training: pairs of items into the neighbour lists of its evidence, and items into the popularity
    of its catalogue. Fitted weights stay. The model is replaced when all files are written.

    Args:
        interactions: the new rows, and only these.
        settings: [`UpdateSettings`], optional.
        history: earlier rows of the same users, counted before: pairs of an earlier and a new item count as well. Rows that are among the new
            ones do not matter, but in tables without times.
        options: single fields of the settings, e.g. `model="runs/mine"`. Columns and positive feedback that are not given are those that the model
            was trained with.

    Raises:
        ValueError: no model, a model without anything to update, rows that were counted before or of which none is of the model's items.
        FileExistsError: `output_dir` is not empty and `overwrite` is not set.

    Example:
        >>> update("monday.csv", history="until_sunday.csv", model="runs/mine").counts  # doctest: +SKIP
        {'rows': 1200, 'positive': 1200, 'unknown_rows': 3, 'unknown_items': 2, 'interactions': 1197, 'pairs': 903, 'cut': 41}
    """
    from onerec_hf.modeling.catalogue import ItemCatalogue

    if not settings:
        options = {**_trained_with(options.get("model")), "output_dir": None, **options}
    (how,) = gather((UpdateSettings,), settings, options)
    assert isinstance(how, UpdateSettings)
    if how.model is None:
        raise ValueError("pass --model: the folder or Hub id of a saved model")
    source = folder_of(how.model)
    target = source if how.output_dir is None else Path(how.output_dir)
    with own_folder(target):
        if how.output_dir is not None:
            check_folder(target, how.overwrite)
        model, items, evidence, to_rows = _load(how.model)
        popularity = items.popularity if isinstance(items, ItemCatalogue) else None
        if evidence is None and popularity is None:
            raise ValueError(
                f"--model {how.model}: it has neither evidence nor popularity, so that nothing can be counted into it. Train on with: "
                "onerec-hf train --model"
            )
        new, rows_read = _read(interactions, how)
        before = None if history is None else _read(history, how)[0]
        digest, earlier = _digest(new), _earlier_updates(source)
        if before is not None and how.timestamp_column == "none":  # places, which begin at 0 in each table
            new["timestamp"] += len(before)
        for each in earlier:
            if each["digest"] == digest:
                raise ValueError(
                    f"these rows were counted into {how.model} on {each['date']}. Pass the rows that are new."
                )
        indices, is_new, offsets, times, told = _sequences(new, before, items)
        counts = {
            "rows": rows_read,
            "positive": len(new),
            **told,
            "interactions": int(is_new.sum()),
            "pairs": 0,
            "cut": 0,
        }
        if evidence is not None:
            from onerec_hf.data.evidence_counts import add_to_evidence

            when = None if how.timestamp_column == "none" else times
            if when is not None and evidence.recent:
                _check_unit(float(evidence.log_times[-1]), float(np.median(when[is_new])))
            counts |= add_to_evidence(evidence, (to_rows(indices), offsets), is_new, when)
            of_evidence = model.config if model_type(how.model) == SEQUENTIAL else model.config.item_head
            of_evidence.recent = evidence.recent
        if popularity is not None:
            added = np.bincount(indices[is_new], minlength=len(items))
            model.set_catalogue(model.catalogue.with_popularity(popularity + added))
        name = Path(interactions).name if isinstance(interactions, str | os.PathLike) else "a table in memory"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _save(model, source, target, [*earlier, {"date": now, "interactions": name, "digest": digest, **counts}])
        return UpdateResult(target, counts, _notes(counts, evidence is not None, history is not None))


def _trained_with(model: str | None) -> dict[str, Any]:
    """The settings of an update that a model was trained with."""
    trained = {} if model is None else read_data_options("--model", model)
    return {each.name: trained[each.name] for each in fields(UpdateSettings) if each.name in trained}


def folder_of(model: str) -> Path:
    """The folder of a model: a repository of the Hub is downloaded."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    from onerec_hf.workflows.artefact import naming

    with naming("--model", model):
        return Path(snapshot_download(model))


def _load(repo: str) -> tuple[Any, ItemLookup, Any, Any]:
    """The model, its items, its evidence, and the function from item indices to indices of the evidence, -1 for items that it lacks."""
    if model_type(repo) == SEQUENTIAL:
        recommender = load_sequential("--model", repo)
        assert recommender.items is not None
        return recommender, recommender.items, recommender.evidence, lambda indices: indices
    catalogue, model = catalogue_of(load_processor("--model", repo)), load_model("--model", repo)
    head: Any = model.get_encoder().item_head
    evidence = None if head is None else head.evidence
    return model, catalogue, evidence, lambda indices: rows_of_items(model, indices) - 1


def _read(table: TableSource, how: UpdateSettings) -> tuple[pd.DataFrame, int]:
    """The positive rows, and how many rows the table has."""
    from onerec_hf.data import PositiveFeedback, read_interactions

    rows = read_interactions(
        table,
        user_column=how.user_column,
        item_column=how.item_column,
        timestamp_column=how.timestamp_column,
        column_names=how.column_names,
    )
    return PositiveFeedback.parse(how.positive or ()).apply(rows), len(rows)


def _sequences(
    new: pd.DataFrame, history: pd.DataFrame | None, items: ItemLookup
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """
    Item indices of the users with new rows in time order, concatenated, which of them are new, the users' offsets and the items' times; and how many
    rows of how many items the model does not hold.

    Raises:
        ValueError: no new row is of the model's items, or ids are of the other type.
    """
    import pandas as pd

    from onerec_hf.data import UserSequences

    keys = ["user_id", "item_id", "timestamp"]
    rows = new[keys].assign(new=True)
    if history is not None:
        before: Any = history.loc[history["user_id"].isin(new["user_id"]), keys]
        again = before.merge(new[keys].drop_duplicates(), how="left", indicator=True)["_merge"] == "both"
        if len(before := before[~again.to_numpy()].assign(new=False)):
            rows = pd.concat([before, rows], ignore_index=True)  # earlier rows first where times are equal
    try:
        indices = items.indices(rows["item_id"].to_numpy(), unknown="mask")
    except TypeError as error:
        raise ValueError(
            f"interactions: {error}. Pass the table with the ids that the model was trained with."
        ) from None
    unknown = rows.loc[(indices < 0) & rows["new"].to_numpy(), "item_id"]
    if len(unknown) == len(new):
        raise ValueError(
            f"interactions: none of {len(new):,} rows is of the model's {len(items):,} items (first: {unknown.iloc[0]!r}). Add them with "
            "onerec-hf add-items, or train on with: onerec-hf train --model"
        )
    known = indices >= 0  # as in training, where rows of rare items are left out
    rows, indices = rows.loc[known], indices[known]
    ordered = UserSequences.from_interactions(rows.assign(item_id=np.arange(len(rows))))
    order = ordered.item_ids.astype(np.int64)
    told = {"unknown_rows": len(unknown), "unknown_items": int(unknown.nunique())}
    return indices[order], rows["new"].to_numpy()[order], ordered.offsets, ordered.times, told


def _check_unit(latest: float, new: float) -> None:
    """
    Raises:
        ValueError: times since 1970 in another unit than the log's: the log would no longer be in the order of time.
    """
    if max(latest, new) > 1e8 and not 0.01 < new / max(latest, 1.0) < 100:
        raise ValueError(
            f"interactions: times around {new:.0f} are of another unit than those that the model was trained with (the latest: {latest:.0f}). Convert "
            "the column"
        )


def _notes(counts: dict[str, int], has_evidence: bool, has_history: bool) -> list[str]:
    notes = []
    if counts["unknown_rows"]:
        notes.append(
            f"{counts['unknown_rows']:,} rows of {counts['unknown_items']:,} items that the model does not hold are left out."
        )
    if not has_evidence:
        notes.append("The model has no evidence about pairs of items: only the popularity of its catalogue changed.")
    elif not has_history:
        notes.append("Pairs of an earlier and a new item of a user are not counted: pass --history for them.")
    if counts["cut"]:
        notes.append(f"{counts['cut']:,} neighbours with small counts fell out of full lists.")
    return notes


def _digest(rows: pd.DataFrame) -> str:
    """The same for the same rows in any order."""
    from pandas.core.util.hashing import hash_pandas_object

    hashes = hash_pandas_object(rows[["user_id", "item_id", "timestamp"]], index=False).to_numpy()
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()


def _earlier_updates(folder: Path) -> list[dict[str, Any]]:
    path = folder / UPDATES_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _save(model: Any, source: Path, target: Path, updates: list[dict[str, Any]]) -> None:
    """What is replaced in place belongs to the same model: a kill between two files leaves one that loads."""
    last = UPDATES_NAME if target.resolve() == source.resolve() else "config.json"
    with replacing_model(model, source, target, last) as folder:
        (folder / UPDATES_NAME).write_text(json.dumps(updates, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing_model(model: Any, source: Path, target: Path, last: str) -> Iterator[Path]:
    """
    Replaces the model in the target folder, with the source's other files beside it in a new folder.

    Args:
        source: the folder that the model was loaded from; may be the target.
        last: the file that is put into its place last.

    Yields:
        The folder in which the files are written, with the model, for what changes beside it.
    """
    from onerec_hf.modeling.files import UNFINISHED_NAME, replacing_files

    weights = ("model*.safetensors", "model.safetensors.index.json")
    with replacing_files(target, last, weights) as temporary:
        if target.resolve() != source.resolve():
            left_out = shutil.ignore_patterns(UNFINISHED_NAME, LOCK, "checkpoints", *weights)
            shutil.copytree(source, temporary, ignore=left_out, dirs_exist_ok=True)
        model.save_pretrained(temporary)
        yield Path(temporary)
