"""Semantic IDs as tokens, "<a_12><b_3>": `.index.json` files of LC-Rec, LETTER and MiniOneRec, and table columns."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.modeling.files import replacing, short
from onerec_hf.semantic_ids.formats.imported import ImportedIDs

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,9})>")
_TOKENS = re.compile(rf"(?:{_TOKEN.pattern}[\s,]*)+")
_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


def read_index_json(
    path: str | os.PathLike,
    *,
    codebook_sizes: Sequence[int] | None = None,
    integer_ids: bool | None = None,
    pad_levels: bool = False,
) -> ImportedIDs:
    """
    Reads the `.index.json` of LC-Rec, LETTER and MiniOneRec: `{"0": ["<a_12>", "<b_3>", "<c_77>"], ...}`, where the letters
    a, b, c, ... denote the levels in order.

    Args:
        codebook_sizes: codes per level (default: the largest code plus one).
        integer_ids: JSON keys are text. None converts the ids to integers if every key is a canonical 64-bit integer ("12", not "012"), as
            for ids in a CSV file. True requires it. False keeps text.
        pad_levels: MiniOneRec's RQ-KMeans adds a level, counted from 1, to colliding items only. True sets this level to 0 for all other
            items. Only one level may be missing.

    Raises:
        ValueError: invalid JSON or structure, no items, duplicate keys, malformed tokens, levels out of order, unequal numbers of levels,
            codes outside their codebook, or non-integer keys with `integer_ids=True`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "Beauty.index.json")
        ...     _ = path.write_text('{"0": ["<a_1>", "<b_0>"], "1": ["<a_0>", "<b_4>"]}')
        ...     imported = read_index_json(path)
        >>> imported.item_ids, imported.codes.tolist(), imported.codebook_sizes
        ([0, 1], [[1, 0], [0, 4]], [2, 5])
    """
    where = os.fspath(path)
    text = Path(path).read_bytes()
    if not text.strip():
        raise ValueError(f"{where} is empty; copy or download it again")
    try:
        content = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({short(error)}); fix it, or download it again") from error
    if not isinstance(content, _Pairs) or not content:
        found = "an empty object" if isinstance(content, _Pairs) else f"JSON of type {type(content).__name__}"
        raise ValueError(
            f'{where} contains {found}; expected an object of items, {{"item": ["<a_12>", "<b_3>", "<c_77>"], ...}}'
        )
    keys = [key for key, _ in content]
    if len(set(keys)) < len(keys):
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        raise ValueError(
            f"{where}: {len(repeated):,} of {len(set(keys)):,} items occur more than once (first: {repeated[0]!r:.80}); keep "
            "one entry per item"
        )
    ids = keys if integer_ids is False else _integers(keys, where, required=bool(integer_ids))
    codes = _parse(ids, [value for _, value in content], where, pad_levels)
    return ImportedIDs(ids, codes, codebook_sizes, where)


def read_semantic_id_strings(
    item_ids: Sequence | np.ndarray,
    semantic_ids: Iterable,
    *,
    codebook_sizes: Sequence[int] | None = None,
    pad_levels: bool = False,
) -> ImportedIDs:
    """
    Parses semantic IDs from a table column: text "<a_1><b_2>" (optionally separated by blanks or commas) or lists
    ["<a_1>", "<b_2>"].

    Args:
        item_ids: N integers or strings.
        semantic_ids: N texts or lists.
        codebook_sizes, pad_levels: as for [`read_index_json`].

    Raises:
        ValueError: unequal numbers of ids and semantic IDs, or invalid tokens as in [`read_index_json`].

    Example:
        >>> read_semantic_id_strings([7, 8], ["<a_1><b_0>", ["<a_0>", "<b_4>"]]).codes.tolist()
        [[1, 0], [0, 4]]
    """
    values, where = list(semantic_ids), "semantic IDs"
    if len(values) != len(item_ids):
        raise ValueError(
            f"{where}: {len(values):,} semantic IDs, but {len(item_ids):,} item_ids; pass one of each per item"
        )
    if not values:
        raise ValueError(f"{where}: no items given")
    ids = np.asarray(item_ids, dtype=object).tolist()
    return ImportedIDs(ids, _parse(ids, values, where, pad_levels), codebook_sizes, where)


def write_index_json(catalogue: ItemCatalogue, path: str | os.PathLike) -> None:
    """
    Writes the `.index.json` of LC-Rec, LETTER and MiniOneRec, under a temporary name that is then renamed.

    The keys are the item ids as text. LETTER and MiniOneRec expect the ids 0 to N-1.

    Raises:
        ValueError: more levels than letters.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "my.index.json")
        ...     write_index_json(ItemCatalogue([0, 1], [[1, 0], [0, 4]], [2, 5]), path)
        ...     print(path.read_text())
        {"0": ["<a_1>", "<b_0>"], "1": ["<a_0>", "<b_4>"]}
    """
    if len(catalogue.codebook_sizes) > len(_LETTERS):
        raise ValueError(
            f"an .index.json supports at most {len(_LETTERS)} levels (one letter each); the catalogue has {len(catalogue.codebook_sizes)} levels"
        )
    index = {
        str(item): [
            f"<{letter}_{code}>" for letter, code in zip(_LETTERS, row, strict=False)
        ]  # more letters than levels
        for item, row in zip(catalogue.item_ids, catalogue.codes.tolist(), strict=True)
    }
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(index, file)


class _Pairs(list):
    """A JSON object as a list of pairs, since a dict drops duplicate keys."""


def _integers(keys: list[str], where: str, required: bool) -> list:
    """Converts keys to integers if all are canonical 64-bit integers, else returns them unchanged."""
    bad = [key for key in keys if not _CANONICAL_INTEGER.fullmatch(key) or not -(2**63) <= int(key) < 2**63]
    if not bad:
        return [int(key) for key in keys]
    if required:
        raise ValueError(
            f"{where}: integer_ids=True, but {len(bad):,} of {len(keys):,} item ids are not integers (first: {bad[0]!r:.80}); omit "
            "it to keep the ids as text"
        )
    return keys


def _parse(item_ids: list, values: list, where: str, pad_levels: bool) -> np.ndarray:
    """(N, L) codes parsed from text or lists of tokens."""
    rows = [_codes_of(value) for value in values]
    bad = [(item, value) for item, row, value in zip(item_ids, rows, values, strict=True) if row is None]
    if bad:
        item, value = bad[0]
        raise ValueError(
            f"{where}: {len(bad):,} of {len(rows):,} items have a malformed semantic ID (first: item {item!r:.80}, {_short(value)}); expected "
            'tokens with a level letter and a code, e.g. ["<a_12>", "<b_3>", "<c_77>"]'
        )
    letters = [("".join(letter for letter, _ in row), row) for row in rows if row is not None]
    disordered = [index for index, (found, _) in enumerate(letters) if found != _LETTERS[: len(found)]]
    if disordered:
        found = letters[disordered[0]][0]
        raise ValueError(
            f"{where}: {len(disordered):,} of {len(rows):,} items have levels out of order (first: item {item_ids[disordered[0]]!r:.80} has "
            f"the levels {short(', '.join(found), 80)}); expected {', '.join(_LETTERS[: len(found)])}, one token each"
        )
    counts = np.array([len(found) for found, _ in letters])
    levels = int(counts.max()) if pad_levels else int(np.bincount(counts).argmax())
    other = counts < levels - 1 if pad_levels else counts != levels
    if other.any():
        row = int(other.argmax())
        one_more = counts.max() - counts.min() == 1
        fix = (
            "pass pad_levels=True if the longer ones are colliding items"
            if one_more
            else "every item needs a code per level"
        )
        raise ValueError(
            f"{where}: {int(other.sum()):,} of {len(rows):,} items do not have {levels} levels (first: item "
            f"{item_ids[row]!r:.80} has {counts[row]}); {fix}"
        )
    return np.array([[code for _, code in row] + [0] * (levels - len(row)) for _, row in letters], dtype=np.int64)


def _codes_of(value: Any) -> list[tuple[str, int]] | None:
    """(letter, code) of every token, or None if `value` is not text or a list of tokens."""
    if isinstance(value, str):
        if not _TOKENS.fullmatch(value.strip()):
            return None
        return [(letter, int(code)) for letter, code in _TOKEN.findall(value)]
    if isinstance(value, _Pairs) or not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return None
    matches = [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in value]
    return None if None in matches else [(match[1], int(match[2])) for match in matches if match is not None]


def _short(value: Any) -> str:
    text = repr(dict(value) if isinstance(value, _Pairs) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."
