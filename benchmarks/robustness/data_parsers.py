"""Parsers of data: tables of interactions, items and impressions, embeddings, preference pairs, histories."""

from __future__ import annotations

import io
import json
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.robustness import formats
from benchmarks.robustness.fuzzing import Parser
from benchmarks.robustness.semantic_id_parsers import make_catalogue, npy_bytes

_USERS = ["u1", "u1", "u1", "u2", "u2", "u3"]
_ITEMS = ["m1", "m2", "m3", "m2", "m1", "m3"]
_TIMES = [30, 10, 20, 5, 6, 7]
_RATINGS = [5.0, 3.5, 1.0, 4.0, 4.5, 2.0]


def _table(items: Any = _ITEMS, users: Any = _USERS) -> dict[str, list]:
    return {"user_id": list(users), "item_id": list(items), "timestamp": list(_TIMES), "rating": list(_RATINGS)}


def _products() -> dict[str, list]:
    return {"item_id": ["m1", "m2", "m3"], "title": ["Red lamp", "Blue lamp", "Vase, old"], "price": [1.5, 2.0, 3.0]}


def _text(columns: dict[str, list], separator: str, quoted: bool = False) -> bytes:
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    written = [[f'"{field}"' if quoted or separator in str(field) else str(field) for field in row] for row in rows]
    return "\n".join(separator.join(row) for row in written).encode() + b"\n"


def _lines(columns: dict[str, list]) -> bytes:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return "\n".join(map(json.dumps, rows)).encode() + b"\n"


def _parquet(columns: dict[str, list]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _atomic(columns: dict[str, list], kinds: list[str]) -> bytes:
    return _text({f"{name}:{kind}": values for (name, values), kind in zip(columns.items(), kinds, strict=True)}, "\t")


def _number_table() -> dict[str, list]:
    return _table([int(item[1:]) for item in _ITEMS], [int(user[1:]) for user in _USERS])


def _read_interactions(path: Path) -> None:
    from onerec_hf.data import PositiveFeedback, UserSequences, read_interactions

    table = read_interactions(path)
    assert len(table)
    assert table["timestamp"].dtype == np.int64
    UserSequences.from_interactions(PositiveFeedback().apply(table)).item_counts()


def _read_items(path: Path, **arguments: Any) -> None:
    """What `load_files` does with the file of items beside one of interactions, without reading that again each time."""
    from onerec_hf.data.columns import about
    from onerec_hf.data.interactions import read_items
    from onerec_hf.data.sources import with_text

    items = read_items(path, **arguments)
    with about(path):
        items.select(["m1", "m2", "m3"])
        with_text(items).frame["text"].map(len)


def _read_saved_items(path: Path) -> None:
    from onerec_hf.data.item_fields import read_items_file

    for item, fields in read_items_file(path, make_catalogue()).items():
        json.dumps([item, fields], allow_nan=False)


def _saved_items() -> list[bytes]:
    import pandas as pd

    from onerec_hf.data.item_fields import save_items_table

    with tempfile.TemporaryDirectory() as folder:
        save_items_table(folder, pd.DataFrame(_products()), make_catalogue())
        return [Path(folder, "items.parquet").read_bytes(), _parquet(_products())]


def _read_impressions(path: Path) -> None:
    from onerec_hf.data.feedback.impressions import load_impressions

    load_impressions(path, {"ltr": "like"}, 8, 15, 25, min_items=1, max_items=2)


def _impressions() -> dict[str, list]:
    return {**_table(), "like": [0, 1, 0.5, 1, 0, 0], "timestamp": [30, 10, 20, 5, 16, 27]}


def _matrix(rows: int, columns: int) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) / 7


def _read_embeddings(path: Path) -> None:
    from onerec_hf.data.interactions import check_embeddings

    matrix = check_embeddings(path, np.arange(6))
    assert matrix.shape[0] == 6
    assert matrix.shape[1] > 0
    float(matrix.sum())


def _preferences() -> dict[str, list]:
    return {"history": [["m1"], ["m2", "m3"]], "chosen": [["m2"], ["m1"]], "rejected": [["m3"], ["m4"]]}


@cache
def _processor():
    from onerec_hf import OneRecProcessor

    return OneRecProcessor.from_catalogue(make_catalogue(), max_history=5)


def _read_preferences(path: Path) -> None:
    from onerec_hf.workflows.preferences import read_preferences

    read_preferences(str(path), _processor())


_COMMA, _TAB = partial(formats.text_table, separator=b","), partial(formats.text_table, separator=b"\t")

_KINDS = ["token", "token", "float", "float"]

DATA_PARSERS = [
    Parser(
        "interactions-csv",
        "clicks.csv",
        _read_interactions,
        lambda: [_text(_table(), ","), _text(_number_table(), ","), _text(_table(), ",", True)],
        _COMMA,
    ),
    Parser(
        "interactions-tsv",
        "clicks.tsv",
        _read_interactions,
        lambda: [_text(_table(), "\t"), _text(_number_table(), "\t")],
        _TAB,
    ),
    Parser(
        "interactions-jsonl",
        "clicks.jsonl",
        _read_interactions,
        lambda: [_lines(_table()), _lines(_number_table())],
        formats.json_lines,
    ),
    Parser(
        "interactions-parquet",
        "clicks.parquet",
        _read_interactions,
        lambda: [_parquet(_table()), _parquet(_number_table())],
        formats.parquet_file,
    ),
    Parser(
        "interactions-inter",
        "clicks.inter",
        _read_interactions,
        lambda: [_atomic(_table(), _KINDS), _atomic(_number_table(), _KINDS)],
        _TAB,
    ),
    Parser("items-csv", "products.csv", _read_items, lambda: [_text(_products(), ",")], _COMMA),
    Parser(
        "items-jsonl",
        "products.jsonl",
        partial(_read_items, embedding_column="vector"),
        lambda: [_lines({**_products(), "vector": [[1.0, 2.0], [0.5, 1], [0, 0]]})],
        formats.json_lines,
    ),
    Parser(
        "items-parquet",
        "products.parquet",
        _read_items,
        lambda: [_parquet(_products())],
        formats.parquet_file,
    ),
    Parser("saved-items", "items.parquet", _read_saved_items, _saved_items, formats.parquet_file),
    Parser(
        "items-item",
        "products.item",
        _read_items,
        lambda: [
            _atomic(_products(), ["token", "token_seq", "float"]),
            _atomic({**_products(), "v": ["1 2", "3 4", ""]}, ["token", "token_seq", "float", "float_seq"]),
        ],
        _TAB,
    ),
    Parser("impressions-csv", "shown.csv", _read_impressions, lambda: [_text(_impressions(), ",")], _COMMA),
    Parser(
        "embeddings-npy",
        "vectors.npy",
        _read_embeddings,
        lambda: [
            npy_bytes(_matrix(6, 4)),
            npy_bytes(_matrix(6, 4).astype(np.float16)),
            npy_bytes(np.asfortranarray(_matrix(6, 4))),
            npy_bytes(np.arange(24).reshape(6, 4), (2, 0)),
        ],
        formats.npy_file,
    ),
    Parser(
        "preferences-jsonl",
        "pairs.jsonl",
        _read_preferences,
        lambda: [_lines(_preferences())],
        formats.json_lines,
    ),
    Parser(
        "preferences-parquet",
        "pairs.parquet",
        _read_preferences,
        lambda: [_parquet(_preferences())],
        formats.parquet_file,
    ),
]
