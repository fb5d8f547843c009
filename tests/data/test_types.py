"""Readers x types: what pandas, pyarrow and polars write is read alike from memory, from files and by `prepare`."""

import datetime
import decimal
import uuid
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_hf.data import DataError, ExampleSettings, Ties, UserSequences, prepare_log, read_interactions, read_items
from onerec_hf.data.shards.buckets import tidy
from onerec_hf.data.shards.logs import Checks, Log
from onerec_hf.data.sources import with_text

IDS = pa.array([9, 7, 8, 7])
WORDS = pa.array(["é", "07", "y", "07"])
DAYS = [datetime.date(2024, 1, day) for day in (4, 2, 1, 3)]
SECONDS = pa.array([1_700_000_004, 1_700_000_002, 1_700_000_001, 1_700_000_003])
IN_ORDER = [2, 1, 3, 0]  # of the rows by time

UUIDS = [uuid.UUID(int=k) for k in (3, 1, 2, 1)]
ID_TYPES = {
    **{
        str(kind): IDS.cast(kind)
        for kind in (pa.int8(), pa.uint16(), pa.int32(), pa.uint64(), pa.float16(), pa.float32())
    },
    **{str(kind): IDS.cast(kind) for kind in (pa.float64(), pa.decimal128(20, 0), pa.decimal128(25, 2))},
    **{str(kind): WORDS.cast(kind) for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary())},
    "large_binary": WORDS.cast(pa.binary()).cast(pa.large_binary()),
    "binary_view": WORDS.cast(pa.binary()).cast(pa.binary_view()),
    "dictionary of strings": WORDS.dictionary_encode(),
    "dictionary of integers": IDS.dictionary_encode(),
    "uuid": pa.array([each.bytes for each in UUIDS], pa.uuid()),
}
TIME_TYPES = {
    **{
        str(kind): SECONDS.cast(kind)
        for kind in (pa.int64(), pa.int32(), pa.uint64(), pa.float64(), pa.decimal128(20, 0))
    },
    **{str(kind): SECONDS.cast(kind) for kind in (pa.timestamp("s"), pa.duration("s"))},
    **{unit: pa.array([4, 2, 1, 3], pa.timestamp(unit)) for unit in ("ms", "us", "ns")},
    "with a zone": pa.array([4, 2, 1, 3], pa.timestamp("ns", "Europe/Berlin")),
    "int16": pa.array([4, 2, 1, 3], pa.int16()),
    "float16": pa.array([0.4, 0.2, 0.1, 0.3], pa.float16()),
    "date32": pa.array(DAYS, pa.date32()),
    "date64": pa.array(DAYS, pa.date64()),
    "text": pa.array(["1700000000000000004", "1700000000000000002.0", "1700000000000000001", "1700000000000000002.5"]),
    "negative text": pa.array(["-1", "-1.5", "-1.75", "-1.25"]),
    "ISO dates": pa.array([str(day) for day in DAYS]).dictionary_encode(),
    "ISO datetimes": pa.array(
        ["2024-01-01 00:30:00+00:00", "2024-01-01T01:00:00.000000001+01:00", "2024-01-01", "2024-01-01T00:00:00.5Z"]
    ),
}


def table(**columns):
    rows = {"user_id": pa.array([1, 1, 1, 1]), "item_id": pa.array(["a", "b", "c", "d"]), "timestamp": SECONDS}
    return pa.table(rows | columns)


def in_memory(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = read_interactions(source, **options)
    return list(zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True))


def prepared(path, **options):
    """The rows that `prepare` makes examples of."""
    log, checks = Log([path], **options), Checks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(log.batches(checks))
        log.require_good(checks)
    return tidy(pl.concat(batches), checks.as_integers).select("user", "item").rows()


def sources(arrow, folder):
    """One table as every reader takes it; files last."""
    pq.write_table(arrow, folder / "rows.parquet")
    yield "pyarrow", arrow
    yield "pandas", arrow.to_pandas()
    if not any(isinstance(kind, pa.BaseExtensionType) for kind in arrow.schema.types):
        yield "Arrow-backed pandas", arrow.to_pandas(types_mapper=pd.ArrowDtype)
        frame = pl.from_arrow(arrow)
        yield "polars", frame
        yield "lazy polars", frame.lazy()
        frame.write_parquet(folder / "polars.parquet")
        yield "polars' Parquet", folder / "polars.parquet"
    yield "Parquet", folder / "rows.parquet"


@pytest.mark.parametrize("kind", ID_TYPES)
def test_ids_of_every_type(tmp_path, kind):
    arrow = table(item_id=ID_TYPES[kind])
    words = [str(each) for each in UUIDS] if kind == "uuid" else None
    values = words or (WORDS if "str" in kind or "binary" in kind else IDS).to_pylist()
    expected = [(1, values[row]) for row in IN_ORDER]
    for name, source in sources(arrow, tmp_path):
        if (name, kind) == ("pandas", "uuid"):
            continue  # pandas has bytes of it
        assert in_memory(source) == expected, name
        if "Parquet" in name:
            assert prepared(source) == expected, name


FRACTIONS = {
    **{unit: pa.array([3, 1, 1, 2], pa.timestamp(unit)) for unit in ("ms", "us", "ns")},
    "float64": pa.array([0.75, 0.25, 0.25, 0.5]),
    "text": pa.array(
        ["1700000000000000000.75", "1700000000000000000.25", "1700000000000000000.25", "1700000000000000000.5"]
    ),
    "ISO": pa.array([f"2024-01-01T00:00:00.00000000{k}" for k in (3, 1, 1, 2)]),
}


@pytest.mark.parametrize("kind", FRACTIONS)
def test_times_within_a_second_are_no_ties(tmp_path, kind):
    """Only b and c have the same time; shuffled ties leave d and a behind them."""
    arrow = table(timestamp=FRACTIONS[kind])
    for name, source in sources(arrow, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = read_interactions(source)
        again = read_interactions(rows)  # as `load_dataset` reads a table that was filtered
        for read in (rows, again):
            sequences = UserSequences.from_interactions(read.sample(frac=1, random_state=0))
            assert (Ties.of(sequences).rows, sequences.tied.tolist()) == (1, [False, True, False, False]), name
            orders = {"".join(sequences.shuffled_ties(seed)[0]) for seed in range(20)}
            assert orders == {"bcda", "cbda"}, name
            assert sequences.where(sequences.item_ids != "b").tied.tolist() == [False] * 3
        if "Parquet" in name:
            manifest = prepare_log(
                source, tmp_path / f"{name} prepared", settings=ExampleSettings(min_item_interactions=1)
            )
            assert manifest["counts"]["tied"] == 0


def test_times_of_a_table_in_memory_are_not_cut():
    rows = pd.DataFrame({"user_id": [1, 1, 1], "item_id": ["c", "a", "b"], "timestamp": [0.9, 0.1, 0.5]})
    assert UserSequences.from_interactions(rows)[0].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("kind", TIME_TYPES)
def test_times_of_every_type(tmp_path, kind):
    expected = [(1, "abcd"[row]) for row in IN_ORDER]
    for name, source in sources(table(timestamp=TIME_TYPES[kind]), tmp_path):
        assert in_memory(source) == expected, name
        if "Parquet" in name:
            assert prepared(source) == expected, name


OBJECTS = {
    "dates": DAYS,
    "datetimes": [datetime.datetime(2024, 1, day, tzinfo=datetime.UTC) for day in (4, 2, 1, 3)],
    "decimals": [decimal.Decimal(f"1700000000.00000000{k}") for k in (4, 2, 1, 3)],
    "periods": pd.PeriodIndex(DAYS, freq="D"),
    "sparse": pd.arrays.SparseArray([4, 2, 1, 3]),
    "nullable": pd.array([4, 2, 1, 3], dtype="Int64"),
    "categories": pd.Categorical(["4", "2", "1", "3"]),
    "texts": ["1700000000.000000004", "1700000000.000000002", "1700000000.000000001", "1700000000.000000003"],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_times_of_pandas(kind):
    rows = pd.DataFrame({"user_id": 1, "item_id": list("abcd"), "timestamp": pd.Series(OBJECTS[kind])})
    if kind == "decimals":
        rows["timestamp"] = rows["timestamp"].map(lambda value: value - 1_700_000_000)
    assert in_memory(rows) == [(1, "abcd"[row]) for row in IN_ORDER]


@pytest.mark.parametrize(
    "suffix", [".csv", ".tsv", ".csv.gz", ".tsv.zst", ".jsonl", ".ndjson", ".json", ".jsonl.gz", ".csv.bz2"]
)
@pytest.mark.parametrize("ids", [[9, 7, 8, 7], [9.0, 7.0, 8.0, 7.0], ["é", "07", "y", "07"]])
def test_files_of_text(tmp_path, suffix, ids):
    rows = pd.DataFrame({"user_id": 1, "item_id": ids, "timestamp": [4, 2, 1, 3], "like": [0.5, None, 1, 0]})
    path = tmp_path / f"rows{suffix}"
    if "json" in suffix:
        rows.to_json(path, orient="records", lines=suffix != ".json", force_ascii=False)
    else:
        with pa.output_stream(str(path), compression="zstd" if suffix.endswith("zst") else "detect") as file:
            file.write(rows.to_csv(index=False, sep="\t" if "tsv" in suffix else ",").encode())
    assert in_memory(path) == prepared(path) == in_memory(rows)


def test_a_named_index_is_a_column_as_in_parquet(tmp_path):
    rows = table().to_pandas().set_index("user_id")
    rows.to_parquet(tmp_path / "rows.parquet")
    assert in_memory(rows) == in_memory(tmp_path / "rows.parquet") == prepared(tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_times_in_a_type_that_is_too_narrow_are_said(tmp_path, kind):
    times = np.array([1, 2, 3, 4], dtype=kind) + (1_700_000_000 if kind == "float32" else 30_000)
    pq.write_table(table(timestamp=pa.array(times)), tmp_path / "rows.parquet")
    with pytest.warns(UserWarning, match=f"'timestamp': its type {kind} holds times of .* only to (128|16)"):
        read_interactions(tmp_path / "rows.parquet")
    log, checks = Log([tmp_path / "rows.parquet"]), Checks()
    list(log.batches(checks))
    with pytest.warns(UserWarning, match=f"'timestamp': its type {kind} holds times of .* only to (128|16)"):
        log.require_good(checks)


def test_long_integers_beside_missing_ones_stay(tmp_path):
    long = 2**53 + 1
    (tmp_path / "items.jsonl").write_text(f'{{"item_id": 1, "ean": {long}}}\n{{"item_id": 2}}\n')
    pq.write_table(pa.table({"item_id": [1, 2], "ean": [long, None]}), tmp_path / "items.parquet")
    for name in ("items.jsonl", "items.parquet"):
        assert read_items(tmp_path / name).frame["ean"].tolist() == [long, pd.NA]


@pytest.mark.parametrize(
    "genres",
    [
        pd.Categorical(["drama", "crime"]),
        [["drama", "war"], ["crime"]],
        [("drama", "war"), None],
        [{"en": "drama", "id": 3}, {"en": "crime", "id": 4}],
        pa.array([["drama"], []], pa.large_list(pa.large_string())),
        pa.array([["drama"], ["crime"]], pa.list_view(pa.string())),
        ["drama", 7],
    ],
)
def test_text_in_every_form_is_text(tmp_path, genres):
    columns = {"item_id": ["a", "b"], "title": ["One", "Two"], "genres": genres}
    tables = [pa.table(columns)] if isinstance(genres, pa.Array) else [pd.DataFrame(columns)]
    if not isinstance(genres, list) or not isinstance(genres[-1], int):
        arrow = tables[0] if isinstance(tables[0], pa.Table) else pa.Table.from_pandas(tables[0])
        pq.write_table(arrow, tmp_path / "items.parquet")
        tables.append(tmp_path / "items.parquet")
    for source in tables:
        assert with_text(read_items(source)).frame["text"].tolist()[0].startswith("One | drama"), source


def test_what_holds_neither_ids_nor_times():
    for column, values, message in (
        ("item_id", [True] * 4, "booleans"),
        ("timestamp", ["2024-13-01"] * 4, "4 of 4 timestamps are neither"),
        ("timestamp", ["2024-01-01T25:00"] * 4, "4 of 4 timestamps are neither"),
        ("timestamp", ["5", "2024-01-01", "6", "7"], "3 of 4 timestamps are numbers and the others dates"),
    ):
        with pytest.raises(DataError, match=message):
            read_interactions(table(**{column: pa.array(values)}))
