"""New items of a saved model, without training: embedded by what the model keeps, under free codes near similar items; or left out of the data."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.artefact import (
    CODEBOOKS_NAME,
    CONTENT_ENCODER_NAME,
    ITEM_ENCODER_NAME,
    ITEMS_NAME,
    RANKINGS,
    SEQUENTIAL,
    catalogue_of,
    load_model,
    load_processor,
    load_ranking,
    load_sequential,
    model_type,
    naming,
)
from onerec_hf.workflows.data_options import read_data_options
from onerec_hf.workflows.dataset import InMemoryDataset, ItemLookup, RecommendationDataset, check_catalogue
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.id_map import write_id_map
from onerec_hf.workflows.run_folder import check_folder, own_folder
from onerec_hf.workflows.settings import gather
from onerec_hf.workflows.updating import folder_of, replacing_model

if TYPE_CHECKING:
    import scipy.sparse

    from onerec_hf.data import ItemTable, UserSequences
    from onerec_hf.data.tables import TableSource
    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

CHOICES = ("add", "skip", "error")
#: Steps between items that count as consumed together, as in the embeddings of behaviour.
_WINDOW = 5


def check_choice(choice: str | None) -> None:
    """
    Raises:
        ValueError: another value of `--new_items`.
    """
    if choice is not None and choice not in CHOICES:
        raise ValueError(f"--new_items {choice}: choose {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")


@dataclass
class AddItemsSettings:
    """The model, the columns of the tables, and the output folder. Columns and rules that are not given are those of the model's training."""

    model: str | None = field(default=None, metadata={"help": "A saved OneRec: folder or Hub id."})
    user_column: str | None = field(default=None, metadata={"help": "Name of the user column of --interactions."})
    item_column: str | None = field(default=None, metadata={"help": "Name of the item column of both tables."})
    timestamp_column: str | None = field(default=None, metadata={"help": "Name of the time column of --interactions."})
    column_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the columns of --interactions, a text file without a header, in order."},
    )
    item_column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of --items without a header, in order."}
    )
    positive: list[str] | None = field(
        default=None, metadata={"help": "Positive feedback, e.g. 'rating>=4' 'like>=1' (any of them)."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the grown model; by default the model's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in --output_dir."})


@dataclass(frozen=True)
class AddedItems:
    """
    The folder of the grown model, and what happened to the items of the table.

    Args:
        folder: of the model with the new items.
        added: ids that the catalogue did not hold.
        left_out: ids of new items that have neither content nor interactions with known items.
        known: how many items the catalogue held before.

    Example:
        >>> AddedItems(Path("runs/mine"), ["m300"], [], 240).added
        ['m300']
    """

    folder: Path
    added: list
    left_out: list
    known: int


def add_items(
    items: TableSource | None = None,
    *settings: object,
    embeddings: np.ndarray | str | None = None,
    interactions: TableSource | None = None,
    **options,
) -> AddedItems:
    """
    Adds the new items of a table to a saved model: they are read in histories and recommended at once, without training. Items that the model holds
    keep their codes. An item head with content scores new items by their content.

    Args:
        items: item ids and the columns that the model was trained with; known items may be among them. None for a model without item data.
        settings: [`AddItemsSettings`], optional.
        embeddings: (rows of `items`, d) embeddings, for a model that was trained with some.
        interactions: a log in which the new items occur: items that are consumed together get similar codes. Needed by models that know items by
            behaviour alone.
        options: single fields of the settings, e.g. `model="runs/mine"`.

    Raises:
        ValueError: no model, a model of another kind or without an item encoder, a table without new items, or none that could be placed.
        FileExistsError: `output_dir` is not empty and `overwrite` is not set.

    Example:
        >>> add_items("new_films.csv", model="runs/films").added  # doctest: +SKIP
        ['m300', 'm301']
    """
    (how,) = gather((AddItemsSettings,), settings, options if settings else {"output_dir": None, **options})
    assert isinstance(how, AddItemsSettings)
    if how.model is None:
        raise ValueError("pass --model: the folder or Hub id of a saved OneRec")
    if how.output_dir is None and not os.path.isdir(how.model):
        raise ValueError(
            f"--model {how.model}: there is no such folder; for a repository of the Hub pass --output_dir, a folder for the grown model"
        )
    if items is None and interactions is None:
        raise ValueError("pass --items, a table of the new items, or --interactions, a log in which they occur")
    with own_folder(how.output_dir or how.model):
        target = None if how.output_dir is None else check_folder(how.output_dir, how.overwrite)
        ids, table, sequences = _read(how, items, embeddings, interactions)
        grown = _grown(how.model, ids, table, sequences)
        if not len(grown.added):
            what = f"all {grown.known:,} items are in its catalogue"
            if len(grown.left_out):
                what = f"none of {len(grown.left_out):,} new items has a known word or interactions with items of the model"
            raise ValueError(f"--model {how.model}: {what}, so that nothing was added. {_cure(table, sequences)}")
        folder = grown.save(target)
        return AddedItems(folder, grown.added, grown.left_out, grown.known)


@contextlib.contextmanager
def with_new_items(
    model: str, items: TableSource | None, interactions: TableSource | None = None, **options
) -> Iterator[str]:
    """
    The folder of a model with the new items of a table, which lasts as long as the block; the model itself where none is new.

    Args:
        model, items, interactions, options: as for [`add_items`].

    Raises:
        ValueError: as [`add_items`], but for a table without new items.
    """
    how = AddItemsSettings(model=model, **options)
    grown = _grown(model, *_read(how, items, None, interactions))
    say(_told(model, grown))
    with tempfile.TemporaryDirectory() as folder:
        yield str(grown.save(Path(folder, Path(model).name))) if len(grown.added) else model


def _read(
    how: AddItemsSettings,
    items: TableSource | None,
    embeddings: np.ndarray | str | None,
    interactions: TableSource | None,
) -> tuple[np.ndarray, ItemTable | None, UserSequences | None]:
    """The ids of the tables' items, the items table, and the sequences of positive interactions."""
    from onerec_hf.data import PositiveFeedback, UserSequences, read_interactions, read_items
    from onerec_hf.data.columns import about
    from onerec_hf.data.sources import with_text

    assert how.model is not None
    trained = read_data_options("--model", how.model)
    columns = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp"}
    columns = {name: getattr(how, name) or trained.get(name, default) for name, default in columns.items()}
    table = sequences = None
    if interactions is not None:
        rules = how.positive if how.positive is not None else trained.get("positive")
        rows = PositiveFeedback.parse(rules or ()).apply(
            read_interactions(interactions, **columns, column_names=how.column_names)
        )
        sequences = UserSequences.from_interactions(rows)
    if items is None:
        assert sequences is not None
        return sequences.item_counts()[0], None, sequences
    table = read_items(
        items, item_column=columns["item_column"], embeddings=embeddings, column_names=how.item_column_names
    )
    with about(items):
        return table.item_ids, with_text(table), sequences


def _told(model: str, grown: _Grown) -> str:
    """What is said of added items."""
    text = f"--model {model}: {len(grown.added):,} new items are added to its catalogue of {len(grown.catalogue) - len(grown.added):,}"
    if len(grown.left_out):
        text += f"; {len(grown.left_out):,} with neither known words nor interactions with its items are left out, e.g. {grown.left_out[0]!r}"
    return text


def _cure(table: ItemTable | None, sequences: UserSequences | None) -> str:
    if sequences is None:
        return "Pass --interactions with a log in which they occur"
    return "Pass --items with their texts" if table is None else "Check --items"


@contextlib.contextmanager
def settled(
    data: RecommendationDataset, model: str, choice: str | None, for_training: bool = False
) -> Iterator[tuple[RecommendationDataset, str]]:
    """
    The dataset and the model after `--new_items`: with "add" a model that holds the new items, in a folder that lasts as long as the block; with
    "skip" a dataset without their rows.

    Args:
        model: folder or Hub id.
        choice: "add", "skip", "error", or None to leave both as they are.
        for_training: give the new items vectors of the item head, for training to fill.

    Raises:
        ValueError: new items and "error", or a model or dataset that cannot do what was chosen.
    """
    if choice is None:
        yield data, model
        return
    lookup = lookup_of(model)
    if choice == "error":
        check_catalogue(f"--model {model}", lookup, data, may_choose=True)
    new = _unknown(model, lookup, data)
    if choice == "error" or not len(new):
        yield data, model
        return
    if choice == "skip":
        yield _without(data, model, new), model
        return
    grown = _grown(model, new, data.items, data.train_sequences, for_training)
    say(_told(model, grown))
    if len(grown.left_out):
        data = _without(data, model, np.asarray(grown.left_out, dtype=new.dtype))
    with tempfile.TemporaryDirectory() as folder:
        yield data, str(grown.save(Path(folder, Path(model).name)) if len(grown.added) else model)


def lookup_of(model: str) -> ItemLookup:
    """The items of a saved model of any kind."""
    kind = model_type(model)
    if kind == SEQUENTIAL:
        items = load_sequential("--model", model).items
        assert items is not None
        return items
    return load_ranking("--model", model)[1] if kind in RANKINGS else catalogue_of(load_processor("--model", model))


def _unknown(model: str, lookup: ItemLookup, data: RecommendationDataset) -> np.ndarray:
    """Ids of the data that the model does not hold."""
    try:
        return data.item_ids[lookup.indices(data.item_ids, unknown="mask") < 0]
    except TypeError as error:
        raise ValueError(
            f"--model {model}: {error} in the data; pass the ids that the model was trained with"
        ) from None


def _without(data: RecommendationDataset, model: str, new: np.ndarray) -> RecommendationDataset:
    """The dataset without the rows of items."""
    if not isinstance(data, InMemoryDataset):
        raise ValueError(
            f"--new_items skip needs --interactions: {len(new):,} items of the prepared folder are not in --model {model}. Use --new_items add, "
            "or prepare the log without them"
        )
    known = ~np.isin(data.sequences.item_ids, new)
    if not known.any():
        raise ValueError(f"--model {model}: none of the {len(data.item_ids):,} items of the data is in its catalogue")
    note = f"{int((~known).sum()):,} rows of {len(new):,} items that the model does not hold are left out."
    data = data.where(known, note)
    say(f"--model {model}: {note}")
    return data


@dataclass(frozen=True, eq=False)
class _Grown:
    """A model with new items, in memory."""

    source: Path
    model: OneRecForConditionalGeneration
    processor: OneRecProcessor
    table: ItemTable | None
    added: list
    left_out: list
    known: int

    @property
    def catalogue(self) -> ItemCatalogue:
        return catalogue_of(self.processor)

    def save(self, target: Path | None) -> Path:
        """Writes the model with its source's other files into a folder, by default its own; `config.json` comes last."""
        from onerec_hf.data.item_fields import save_items_table
        from onerec_hf.modeling.items_file import saved_items

        target = target or self.source
        with replacing_model(self.model, self.source, target, "config.json") as folder:
            self.processor.items_file = None
            self.processor.save_pretrained(folder)
            if self.table is not None and (self.source / ITEMS_NAME).is_file():
                shutil.copyfile(self.source / ITEMS_NAME, folder / ITEMS_NAME)
                save_items_table(folder, self.table, self.catalogue, keep=True)
            write_id_map(folder, self.catalogue, saved_items(folder, self.catalogue), target.resolve().name)
        return target


def _grown(
    repo: str,
    ids: np.ndarray,
    table: ItemTable | None,
    sequences: UserSequences | None,
    for_training: bool = False,
) -> _Grown:
    """
    The model of a folder or Hub repository with those of the items that it does not hold.

    Raises:
        ValueError: as `add_items`.
    """
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.configuration_onerec_v2 import OneRecV2Config
    from onerec_hf.semantic_ids import Quantizer, extend_catalogue
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder

    source = folder_of(repo)
    if (kind := model_type(repo)) not in (OneRecConfig.model_type, OneRecV2Config.model_type):
        raise ValueError(
            f"--model {repo}: it holds a model of type {kind!r:.40}, whose items are learned by training; train it anew on the new data"
        )
    with naming("--model", repo):
        for name in (ITEM_ENCODER_NAME, CODEBOOKS_NAME):
            if not (source / name).is_file():
                raise ValueError(
                    f"it holds no {name}, which embeds new items: models of earlier versions, or with imported semantic IDs, do not. Extend "
                    "the catalogue in Python (extend_catalogue), or train anew"
                )
        encoder, quantizer = ItemEncoder.load(source / ITEM_ENCODER_NAME), Quantizer.load(source / CODEBOOKS_NAME)
        content = None
        if (source / CONTENT_ENCODER_NAME).is_file():
            content = ItemEncoder.load(source / CONTENT_ENCODER_NAME)
    processor, model = load_processor("--model", repo), load_model("--model", repo)
    catalogue = catalogue_of(processor)
    try:
        new = ids[catalogue.indices(ids, unknown="mask") < 0]
    except TypeError as error:
        raise ValueError(
            f"--model {repo}: {error} in the table; pass the ids that the model was trained with"
        ) from None
    rows = None if table is None or not len(new) else table.select(new)
    vectors = _encoded(encoder, rows, len(new), repo)
    known = quantizer.decode(_codes(catalogue, len(quantizer.codebook_sizes))).numpy()
    if known.shape[1] != encoder.width:
        raise ValueError(
            f"--model {repo}: {ITEM_ENCODER_NAME} makes vectors of {encoder.width} columns, {CODEBOOKS_NAME} takes {known.shape[1]}: they belong to "
            "different models; copy both again"
        )
    counts, together = _together(sequences, catalogue, new)
    vectors = encoder.with_behaviour(vectors, known, together)
    placed = vectors.any(1)
    added = new[placed]
    if len(added):
        popularity = None if catalogue.popularity is None else counts[placed]
        with naming("--model", repo):
            grown = extend_catalogue(catalogue, quantizer, added, vectors[placed], popularity=popularity)
        of_added = None
        head: Any = model.get_encoder().item_head
        if content is not None and head is not None and head.content is not None:
            some = None if rows is None else rows.select(added)
            of_added = _encoded(content, some, len(added), repo)
        _set_catalogue(model, grown, added, of_added, for_training)
        processor.set_catalogue(grown, _item_values(processor, rows, added))
    return _Grown(source, model, processor, table, added.tolist(), new[~placed].tolist(), len(ids) - len(new))


def _item_values(processor: OneRecProcessor, rows: ItemTable | None, added: np.ndarray) -> dict[Any, dict] | None:
    """Values of the features of new items in the columns of their table."""
    from onerec_hf.data.columns import column_of
    from onerec_hf.data.features import raw_values

    if processor.features is None or rows is None:
        return None
    frame = rows.select(added).frame
    named = [feature.name for feature in processor.features.item if feature.name in frame]
    raw = {name: raw_values(name, column_of(frame, name)) for name in named}
    columns = {name: of.astype(object).where(of.notna(), None).tolist() for name, of in raw.items()}
    return {
        item: {name: values[place] for name, values in columns.items()} for place, item in enumerate(added.tolist())
    }


def _encoded(encoder: Any, rows: ItemTable | None, items: int, repo: str) -> np.ndarray:
    """(items, width) vectors of the rows' content."""
    if rows is None:
        return np.zeros((items, encoder.width), dtype=np.float32)
    with naming("--model", repo):
        return encoder.encode(rows.frame["text"].tolist(), rows.embeddings)


def _codes(catalogue: ItemCatalogue, levels: int) -> Any:
    import torch

    return torch.tensor(catalogue.codes[:, :levels], dtype=torch.long)


def _together(
    sequences: UserSequences | None, catalogue: ItemCatalogue, new: np.ndarray
) -> tuple[np.ndarray, scipy.sparse.csr_matrix | None]:
    """How often each new item occurs, and how often beside each known item: (new, known), less for popular ones."""
    from onerec_hf.semantic_ids.embeddings import cooccurrence

    if sequences is None or not len(new):
        return np.zeros(len(new), dtype=np.int64), None
    rows = catalogue.indices(sequences.item_ids, unknown="mask")
    order = np.argsort(new, kind="stable")
    places = np.searchsorted(new, sequences.item_ids, sorter=order).clip(max=len(new) - 1)
    is_new = new[order[places]] == sequences.item_ids
    rows = np.where(is_new, len(catalogue) + order[places], rows)
    kept = rows >= 0
    lengths = np.bincount(sequences.user_rows[kept], minlength=len(sequences))
    lists = np.split(rows[kept], np.cumsum(lengths)[:-1])
    counts = np.bincount(rows[kept], minlength=len(catalogue) + len(new))
    table = cooccurrence(lists, len(catalogue) + len(new), _WINDOW).tocsr()
    beside = table[len(catalogue) :, : len(catalogue)]
    damped = beside.multiply(np.maximum(counts[: len(catalogue)], 1) ** -0.75).tocsr()
    return counts[len(catalogue) :], damped


def _set_catalogue(
    model: Any, grown: ItemCatalogue, added: np.ndarray, content: np.ndarray | None, for_training: bool
) -> None:
    """Sets the grown catalogue, with rows of the item head for the new items where they are scored by content or codes, or trained."""
    import torch

    head = model.get_encoder().item_head
    if content is not None:
        model.set_catalogue(grown, dict(zip(added.tolist(), content, strict=True)))
        return
    model.set_catalogue(grown)
    if head is not None and (for_training or head.config.score_codes):
        head.extend(torch.tensor(grown.codes[grown.indices(added)], dtype=torch.long))
