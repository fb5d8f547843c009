"""`items.parquet` beside a catalogue: titles and other columns of the items table, written with a model and shown in answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, column_of
from onerec_hf.data.interactions import ItemTable, read_items
from onerec_hf.data.lists import is_listed
from onerec_hf.data.types import text_of
from onerec_hf.modeling.items_file import ITEMS_NAME
from onerec_hf.modeling.requests import RESERVED_FIELDS

if TYPE_CHECKING:
    from onerec_hf.data.tables import TableSource
    from onerec_hf.modeling.catalogue import ItemCatalogue

_CATALOGUE_KEY = b"onerec_hf.catalogue"
_MOST_CHARACTERS = 2_000  # of a value, on average: longer ones are documents, not what an answer shows
_MOST_CACHED = 100_000  # items


class ItemFields(Mapping):
    """
    The fields of a catalogue's items, as a mapping from item ids to dictionaries. Values are held in columns; a dictionary is made when it is
    read, without missing values.

    Args:
        items: ids and columns. Items that the catalogue does not hold are left out.
        catalogue: the one that answers come from.

    Raises:
        DataError: none of the items is in the catalogue, or ids are of another type than the catalogue's.

    Example:
        >>> from onerec_hf import ItemCatalogue
        >>> catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> items = read_items(pd.DataFrame({"item_id": [8, 7], "title": ["Alien", "Heat"], "year": [1979, None]}))
        >>> fields = ItemFields(items, catalogue)
        >>> fields[8], fields[7], 9 in fields
        ({'title': 'Alien', 'year': 1979}, {'title': 'Heat'}, False)
    """

    def __init__(self, items: ItemTable, catalogue: ItemCatalogue):
        import pyarrow as pa

        rows = _rows(items, catalogue)
        self.catalogue = catalogue
        frame = items.frame.drop(columns="item_id")
        self._columns = {str(name): pa.array(shown_values(column_of(frame, name))) for name in frame.columns}
        self._places = np.full(len(catalogue), -1, dtype=np.int64)
        self._places[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        self._cached: dict[Any, dict] = {}

    @property
    def columns(self) -> list[str]:
        """Names of the fields."""
        return list(self._columns)

    def __getitem__(self, item_id: Any) -> dict:
        found = self._cached.get(item_id)
        if found is None:
            try:
                (row,) = self.catalogue.indices([item_id], unknown="mask")
            except (TypeError, ValueError):
                raise KeyError(item_id) from None
            place = int(self._places[row]) if row >= 0 else -1
            if place < 0:
                raise KeyError(item_id)
            values = {name: column[place].as_py() for name, column in self._columns.items()}
            found = {name: value for name, value in values.items() if value is not None}
            if len(self._cached) >= _MOST_CACHED:
                self._cached.clear()
            self._cached[item_id] = found
        return found

    def __iter__(self) -> Iterator:
        return iter(self.catalogue.ids(np.flatnonzero(self._places >= 0)))

    def __len__(self) -> int:
        return int((self._places >= 0).sum())


def save_items_table(
    folder: str | os.PathLike, items: ItemTable | TableSource, catalogue: ItemCatalogue, keep: bool = False
) -> str:
    """
    Writes `items.parquet` into a folder: a row per item of the catalogue, in its order, with the columns that answers can show. Left out are
    vectors and other nested values, texts of more than 2,000 characters on average, columns without any value, and columns named "item",
    "items" or "score". A column `text` that only joins the others is left out too, without a note.

    Args:
        items: the items table, or its source (see [`read_items`]). Items that the catalogue does not hold are left out.
        catalogue: the one beside which the file stands.
        keep: keep the rows of the folder's `items.parquet` for items that `items` does not hold: for items that are added to a catalogue.

    Returns:
        Which columns were left out, and why; empty where none was.

    Raises:
        DataError: none of the items is in the catalogue, or, with `keep`, a file that is damaged or belongs to another catalogue.
        OSError: the disk is full or read-only.

    Example:
        >>> import tempfile
        >>> from onerec_hf import ItemCatalogue
        >>> catalogue = ItemCatalogue([7, 8], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> table = pd.DataFrame({"item_id": [8, 7], "title": ["Alien", "Heat"], "vector": [[0.1], [0.2]]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     note = save_items_table(folder, table, catalogue)
        ...     note, dict(read_items_file(f"{folder}/items.parquet", catalogue))
        ('items.parquet: 1 of 2 columns left out: vector (nested values)', {7: {'title': 'Heat'}, 8: {'title': 'Alien'}})
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from onerec_hf.modeling.files import replacing

    items = items if isinstance(items, ItemTable) else read_items(items)
    path = Path(folder, ITEMS_NAME)
    rows = _rows(items, catalogue)
    columns, left_out = _shown_columns(items.frame.drop(columns="item_id"))
    frame = pd.DataFrame(columns, index=pd.RangeIndex(len(items)))[rows >= 0]
    frame.index = pd.Index(rows[rows >= 0])
    if keep and path.is_file():
        before = _read(path, catalogue)
        old = before.frame.drop(columns="item_id").set_index(_rows(before, catalogue))
        old = old[(old.index >= 0) & ~old.index.isin(frame.index)]
        frame = pd.concat([old, frame]) if len(old) else frame
    frame = pd.DataFrame(frame.reindex(np.arange(len(catalogue))))
    ids = pd.Series(catalogue.item_ids)
    table = {"item_id": pa.array(ids)} | {name: pa.array(shown_values(column_of(frame, name))) for name in frame}
    metadata = {_CATALOGUE_KEY: catalogue.hash.encode()}
    with replacing(path) as temporary:
        pq.write_table(pa.table(table).replace_schema_metadata(metadata), temporary, compression="zstd")
    if not left_out:
        return ""
    reasons = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
    return f"{ITEMS_NAME}: {len(left_out)} of {len(items.frame.columns) - 1} columns left out: {reasons}"


def read_items_file(path: str | os.PathLike, catalogue: ItemCatalogue) -> ItemFields:
    """
    The fields that `save_items_table` wrote, or those of any Parquet file with a column `item_id`.

    Raises:
        DataError: the file is damaged, has no column `item_id`, or belongs to another catalogue.

    Example:
        >>> read_items_file("my-model/items.parquet", processor.catalogue)["m17"]  # doctest: +SKIP
        {'title': 'Heat', 'year': 1995}
    """
    return ItemFields(_read(Path(path), catalogue), catalogue)


def _read(path: Path, catalogue: ItemCatalogue) -> ItemTable:
    import pyarrow.parquet as pq

    items = read_items(path)
    written_for = (pq.read_schema(path).metadata or {}).get(_CATALOGUE_KEY)
    if written_for is not None and written_for.decode("ascii", "replace") not in (catalogue.hash, *catalogue.lineage):
        raise DataError(f"{path}: written for another catalogue. Remove it, or write it again with save_items_table.")
    try:
        _rows(items, catalogue)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return items


def _rows(items: ItemTable, catalogue: ItemCatalogue) -> np.ndarray:
    """The items' indices in the catalogue, -1 where it does not hold one."""
    try:
        rows = catalogue.indices(items.item_ids, unknown="mask")
    except (TypeError, ValueError) as error:
        raise DataError(f"column 'item_id': {error}") from None
    if not (rows >= 0).any():
        raise DataError(
            f"column 'item_id': none of {len(items):,} ids is in the catalogue of {len(catalogue):,} items, e.g. "
            f"{items.item_ids[:1].tolist()[0]!r:.60}. Pass the items that the catalogue was made for."
        )
    return rows


def _shown_columns(frame: pd.DataFrame) -> tuple[dict[str, pd.Series], dict[str, str]]:
    """The columns to save, and why each of the others is left out."""
    columns: dict[str, pd.Series] = {}
    left_out: dict[str, str] = {}
    for label in frame.columns:
        name, values = str(label), column_of(frame, label)
        if name in RESERVED_FIELDS:
            left_out[name] = "answers use this name"
            continue
        values = values.map(text_of) if _lists_words(values) else values
        kind = pd.api.types.infer_dtype(values, skipna=True)
        if kind.startswith("mixed") and any(
            not isinstance(v, str | int | float | np.generic) for v in values.dropna()
        ):
            left_out[name] = "nested values"
            continue
        shown = shown_values(values)
        present = shown.dropna()
        if present.empty:
            left_out[name] = "no values"
        elif isinstance(present.iloc[0], str) and (length := present.str.len().mean()) > _MOST_CHARACTERS:
            left_out[name] = f"{length:,.0f} characters on average"
        else:
            columns[name] = shown
    if (
        "text" in columns
        and len(columns) > 1
        and _joins(columns["text"], [columns[n] for n in columns if n != "text"])
    ):
        del columns["text"]  # nothing is lost
    return columns, left_out


def _lists_words(values: pd.Series) -> bool:
    """Whether a column holds lists of words, such as genres, which are shown as one text."""
    return is_listed(values) and all(isinstance(word, str) for words in values.dropna() for word in words)


def shown_values(values: pd.Series) -> pd.Series:
    """
    A column as answers show it: texts, integers, floats or booleans, without empty texts and numbers that are not finite. Whole numbers that
    pandas holds as floats because some are missing become integers again; dates and mixed values become text.

    Example:
        >>> shown_values(pd.Series([1979.0, None])).dropna().tolist(), shown_values(pd.Series(["", "Heat"])).dropna().tolist()
        ([1979], ['Heat'])
        >>> shown_values(pd.Series([1, 2**64 - 1], dtype="uint64")).tolist()
        ['1', '18446744073709551615']
    """
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind == "categorical":
        return shown_values(values.astype(values.cat.categories.dtype))
    if kind in ("floating", "mixed-integer-float"):
        numbers = values.astype("Float64")
        numbers = numbers.where(np.isfinite(numbers.to_numpy(dtype=np.float64, na_value=np.nan)))
        whole = (
            numbers.isna().any() and bool((numbers.dropna() % 1 == 0).all()) and bool((numbers.abs() < 2**53).all())
        )
        return numbers.astype("Int64" if whole else "Float64")
    if kind == "integer":
        known = values.dropna()
        if int(known.min()) >= -(2**63) and int(known.max()) < 2**63:
            return values.astype("Int64")  # larger ones are shown as text
    if kind == "boolean":
        return values.astype("boolean")
    texts = values.astype(object).where(values.notna(), None)
    empty = (None, "")
    return texts.map(lambda value: None if isinstance(value, str | None) and value in empty else str(value)).astype(
        object
    )


def _joins(text: pd.Series, others: list[pd.Series]) -> bool:
    """Whether each text is made of the other columns' values, as `with_text` joins them."""
    for joined, *parts in zip(text, *others, strict=True):
        wanted = set() if pd.isna(joined) else set(joined.split(" | "))
        if not wanted <= {piece for part in parts if not pd.isna(part) for piece in str(part).split(" | ")}:
            return False
    return True


__all__ = ["ITEMS_NAME", "ItemFields", "read_items_file", "save_items_table", "shown_values"]
