"""What people know items by: their ids in a catalogue, checked with an error that says where, and titles and other fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue


def known_rows(catalogue: ItemCatalogue, ids, name: str, unknown: str) -> tuple[np.ndarray, int]:
    """Catalogue rows of those of `ids` that it holds, in order, and how many it lacks; errors begin with `name`."""
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes | Mapping):
        raise ValueError(f'{name} must be a list of item ids, e.g. ["m17", "m4"]; got {ids!r:.60}')
    try:
        rows = catalogue.rows(ids, unknown="mask" if unknown == "skip" else "error")
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error.args[0]}") from None
    known = rows[rows >= 0]
    return known, len(rows) - len(known)


def item_metadata(items: Any, catalogue: ItemCatalogue) -> dict[Any, dict]:
    """
    What is known of items, as a dictionary of fields by item id.

    Args:
        items: a mapping from ids to titles or to dictionaries of fields, or a table with a column `item_id` (see
            [`GenerativeRecommendationPipeline`]). Empty values (`None`, NaN) are left out.
        catalogue: what the ids have to be of.

    Raises:
        ValueError: no column `item_id`, a field named "item", "items" or "score", or no item of the catalogue.
        TypeError: ids of another type than the catalogue's.

    Example:
        >>> from onerec_hf import ItemCatalogue
        >>> catalogue = ItemCatalogue([7, 8], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> item_metadata({"item_id": [7, 8], "title": ["Heat", "Alien"], "year": [1995, None]}, catalogue)
        {7: {'title': 'Heat', 'year': 1995}, 8: {'title': 'Alien'}}
    """
    try:
        # By item, of a mapping or a Series; or by column, of a dictionary of columns or a DataFrame.
        table = dict(items.items())
    except AttributeError:
        rows = list(items) if isinstance(items, Iterable) else [items]
        if not all(isinstance(row, Mapping) and "item_id" in row for row in rows):
            raise ValueError(
                f'items must be a mapping, or a table with a column "item_id"; got {items!r:.60}'
            ) from None
        fields_of = {row["item_id"]: {name: row[name] for name in row if name != "item_id"} for row in rows}
    else:
        if "item_id" in table:
            ids = table.pop("item_id")
            columns = zip(*table.values(), strict=True) if table else ((),) * len(ids)
            fields_of = {item: dict(zip(table, row, strict=True)) for item, row in zip(ids, columns, strict=True)}
        else:
            fields_of = {
                item: fields if isinstance(fields, Mapping) else {"title": fields} for item, fields in table.items()
            }
    taken = {"item", "items", "score"} & {name for fields in fields_of.values() for name in fields}
    if taken:
        raise ValueError(f"items has a field {min(taken)!r}, which answers have themselves; rename it")
    rows, _ = known_rows(catalogue, list(fields_of), "items", "skip")
    if not len(rows):
        raise ValueError(
            f"items: none of {len(fields_of)} ids is in the catalogue of {len(catalogue)} items, e.g. {next(iter(fields_of), None)!r}; "
            'a table needs a column "item_id"'
        )
    return {
        item: {name: _plain(value) for name, value in fields.items() if not _is_empty(value)}
        for item, fields in fields_of.items()
    }


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


__all__ = ["item_metadata", "known_rows"]
