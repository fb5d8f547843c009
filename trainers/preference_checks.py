"""Validates preference rows of items before training starts."""

from __future__ import annotations

from itertools import chain

import numpy as np
from datasets import Dataset

from onerec_hf.modeling.processing_onerec import OneRecProcessor


def check_item_rows(dataset: Dataset, processor: OneRecProcessor, columns: tuple[str, ...], name: str) -> None:
    """
    Checks that sessions are not empty, that all items are in the catalogue, and that chosen and rejected sessions differ.

    Args:
        dataset: `columns` contain lists of item ids; `rejected` may contain several lists.
        processor: the processor with the catalogue.
        columns: columns to check, of history, session, chosen, rejected.
        name: name of the dataset, for messages.

    Raises:
        ValueError: invalid rows (with their number and the first).

    Example:
        >>> from onerec_hf import ItemCatalogue
        >>> catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
        >>> processor = OneRecProcessor.from_catalogue(catalogue)
        >>> rows = Dataset.from_dict({"history": [[7], [7]], "chosen": [[8], [9]], "rejected": [[9], [9]]})
        >>> check_item_rows(rows, processor, ("history", "chosen", "rejected"), "training")
        Traceback (most recent call last):
        ...
        ValueError: the training dataset: chosen equals rejected in 1 of 2 rows (first: row 1); drop these rows
    """
    assert processor.catalogue is not None
    values = {column: _lists(dataset, column) for column in columns}
    for column, rows in values.items():
        flat = list(chain.from_iterable(chain.from_iterable(rows)))
        unknown = np.flatnonzero(processor.catalogue.indices(flat, unknown="mask") < 0) if flat else []
        if len(unknown):
            raise ValueError(
                f"the {name} dataset: {len(unknown)} of {len(flat)} items of {column!r} are not in the model's catalogue (first: "
                f"{flat[unknown[0]]!r}); drop these rows, or use the catalogue that they were made with"
            )
        if column == "history":
            continue
        empty = [row for row, lists in enumerate(rows) if not lists or not all(lists)]
        _refuse(empty, len(rows), name, f"{column!r} is empty in {{}}; drop these rows")
    if {"chosen", "rejected"} <= values.keys():
        same = [
            row
            for row, (chosen, rejected) in enumerate(zip(values["chosen"], values["rejected"], strict=True))
            if chosen[0] in rejected
        ]
        _refuse(same, len(dataset), name, "chosen equals rejected in {}; drop these rows")


def _lists(dataset: Dataset, column: str) -> list[list[list]]:
    """For each row the lists of the column: one, or several rejected ones."""
    rows = [row or [] for row in dataset[column]]
    several = any(row and isinstance(row[0], list) for row in rows)
    return rows if several else [[row] for row in rows]


def _refuse(wrong: list[int], total: int, name: str, message: str) -> None:
    if wrong:
        raise ValueError(
            f"the {name} dataset: " + message.format(f"{len(wrong)} of {total} rows (first: row {wrong[0]})")
        )
