"""Preparing logs of any size: what the in-memory path yields for the same table, whatever the buckets, shards and files."""

import json
import re
import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from onerec_hf.data import (
    DataError,
    PositiveFeedback,
    Ties,
    UserSequences,
    leave_one_out,
    prefix_examples,
    read_interactions,
)
from onerec_hf.data.shards import passes
from onerec_hf.data.shards.buckets import ExampleSettings
from onerec_hf.data.shards.write import prepare_log

LIKED = PositiveFeedback({"like": 1})
ID = st.one_of(st.sampled_from(["7", "07", "é", "a,b", "NA"]), st.integers(0, 12).map(str))
NUMBER = st.integers(0, 12)


@st.composite
def tables(draw):
    """Few users, items and instants, so that all of them repeat; ids of text or numbers, times of three kinds."""
    rows = draw(st.integers(1, 60))
    users = draw(st.lists(draw(st.sampled_from([ID, NUMBER])), min_size=rows, max_size=rows))
    items = draw(st.lists(draw(st.sampled_from([ID, NUMBER])), min_size=rows, max_size=rows))
    times = draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    table = pd.DataFrame({"user_id": users, "item_id": items, "timestamp": times})
    kind = draw(st.sampled_from(["int", "float", "datetime"]))
    if kind == "float":
        table["timestamp"] = table["timestamp"] / 4
    if kind == "datetime":
        table["timestamp"] = pd.to_datetime(table["timestamp"], unit="s", utc=draw(st.booleans()))
    if draw(st.booleans()):
        table["like"] = draw(st.lists(st.sampled_from([0.0, 1.0, 2.5, None]), min_size=rows, max_size=rows))
    for name in ("event", "session")[: draw(st.integers(0, 2))]:  # numbers of the rows, nearly always
        table[name] = draw(st.permutations(range(rows)))
        table.loc[rows - 1, name] = draw(st.integers(0, 99))
    if draw(st.booleans()):
        table = pd.concat([table, table.iloc[: draw(st.integers(0, rows))]], ignore_index=True)  # exact duplicates
    return table


def in_memory(source, positive, settings):
    interactions = read_interactions(source)
    sequences = UserSequences.from_interactions(positive.apply(interactions))
    sequences = sequences.k_core(min_user=1, min_item=settings.min_item_interactions)
    return sequences, leave_one_out(sequences, settings.session_length, settings.max_history, settings.stride)


def with_warnings(function, *args):
    """What a function returns or raises, and what it says of hidden duplicates and of ties, without the cure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*args)
        except DataError as error:
            result = error
    texts = [str(each.message) for each in caught]
    said = [re.search(r"\d+ of \d+ rows equal an earlier .* which|A tie in time .* id\.", text) for text in texts]
    return result, [found[0] for found in said if found]


def examples(path, columns=("user_id", "history", "session")):
    """Rows in an order of their own; a row stands there as often as it is there."""
    rows = pq.read_table(path, columns=list(columns)).to_pylist()
    return sorted(rows, key=repr)


def assert_equals_in_memory(folder, manifest, source, positive, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequences, split = in_memory(source, positive, settings)
    shards = [folder / shard["file"] for shard in manifest["train"]]
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [shard["rows"] for shard in manifest["train"]]
    assert max(shard["rows"] for shard in manifest["train"]) - min(shard["rows"] for shard in manifest["train"]) <= 1
    trained_on = sorted((row for shard in shards for row in examples(shard)), key=repr)
    assert trained_on == sorted(split.train.to_list(), key=repr)
    for name in ("validation", "test"):
        held_out = getattr(split, name).remove_columns("request_time")  # a prepared folder has no times
        assert examples(folder / f"{name}.parquet") == sorted(held_out.to_list(), key=repr)
    learned = {row["user_id"]: row["items"] for row in pq.read_table(folder / "sequences.parquet").to_pylist()}
    expected = dict(zip(split.train_sequences.user_ids.tolist(), split.train_sequences.lists(), strict=True))
    assert learned == {user: items.tolist() for user, items in expected.items()}
    items, interactions = sequences.item_counts()
    table = pq.read_table(folder / "items.parquet").to_pydict()
    assert (table["item_id"], table["interactions"]) == (items.tolist(), interactions.tolist())
    assert sum(table["train_interactions"]) == len(split.train_sequences.item_ids)
    counts = manifest["counts"]
    assert counts["rows"] - counts["not_positive"] - counts["repeated"] - counts["rare_items"] == counts["kept"]
    assert (counts["kept"], counts["users"], counts["items"]) == (
        len(sequences.item_ids),
        len(sequences),
        len(items),
    )
    assert split.description in manifest["protocol"]
    assert counts["tied"] == Ties.of(sequences).tied


@settings(deadline=None, max_examples=20)
@given(
    tables(),
    st.sampled_from(["parquet", "csv", "jsonl"]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.builds(ExampleSettings, st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(1, 3)),
)
def test_it_equals_the_in_memory_path(tmp_path_factory, table, kind, files, buckets, shards, example_settings):
    if kind != "parquet" and not pd.api.types.is_numeric_dtype(table["timestamp"]):
        table["timestamp"] = table["timestamp"].astype("int64")
    folder = tmp_path_factory.mktemp("log")
    (folder / "raw").mkdir()
    if kind == "jsonl":
        # JSON has one type per value: a column without numbers of its own stays as it is.
        table = table.astype({"timestamp": float})
    writers = {
        "parquet": lambda part, path: part.to_parquet(path, index=False),
        "csv": lambda part, path: part.to_csv(path, index=False),
        "jsonl": lambda part, path: part.to_json(path, orient="records", lines=True),
    }
    size = -(-len(table) // files)
    for number, start in enumerate(range(0, len(table), size)):
        writers[kind](table.iloc[start : start + size], folder / "raw" / f"part-{number}.{kind}")
    whole = folder / f"whole.{kind}"
    writers[kind](table, whole)
    positive = LIKED if "like" in table else PositiveFeedback()
    ready = folder / "ready"

    def run():
        return prepare_log(
            folder / "raw",
            ready,
            positive=positive,
            settings=example_settings,
            num_shards=shards,
            rows_per_bucket=-(-len(table) // buckets),
        )

    found, said = with_warnings(in_memory, whole, positive, example_settings)
    manifest, said_streamed = with_warnings(run)
    if isinstance(found, DataError):
        assert isinstance(manifest, DataError)
        event("refused by both")
        assert sorted(path.name for path in folder.iterdir()) == ["raw", whole.name]
        return
    if positive is not LIKED:  # duplicates are of positive rows
        assert said_streamed == said
        event(f"said: {len(said)}")
    assert_equals_in_memory(ready, manifest, whole, positive, example_settings)
    assert sorted(path.name for path in folder.iterdir()) == ["raw", "ready", whole.name]


def write_log(folder, rows=600, seed=0, files=3, **columns):
    """A log of several Parquet files; returns its folder and the whole table."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "user_id": rng.integers(0, 30, rows),
            "item_id": rng.integers(0, 40, rows),
            "timestamp": rng.integers(0, 10**6, rows),
            "like": rng.integers(0, 2, rows),
            **columns,
        }
    )
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        table.iloc[part].to_parquet(folder / f"part-{number}.parquet", index=False)
    return folder, table


def test_columns_that_hide_duplicates_are_found_in_any_batch(tmp_path, monkeypatch):
    """Of a column that numbers the rows a part of the values is followed: the one that repeats is among them, or no value does."""
    monkeypatch.setattr("onerec_hf.data.shards.logs.BATCH_ROWS", 37)
    monkeypatch.setattr("onerec_hf.data.shards.numbering._MOST", 100)
    monkeypatch.setattr("onerec_hf.data.shards.numbering._FIRST_ROWS", 20)
    raw, table = write_log(
        tmp_path / "raw", event=np.arange(600), often=np.arange(600) // 2 + 300 * (np.arange(600) < 20)
    )
    again = table.iloc[50:57].assign(event=range(600, 607))
    again.to_parquet(raw / "part-3.parquet", index=False)
    with pytest.warns(
        UserWarning, match="7 of 607 rows equal an earlier row but for event, which differs in every row"
    ):
        manifest = prepare_log(raw, tmp_path / "ready", num_shards=2, rows_per_bucket=50)
    assert (manifest["counts"]["repeated"], manifest["counts"]["rows"]) == (0, 607)


def test_batches_smaller_than_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr("onerec_hf.data.shards.logs.BATCH_ROWS", 37)
    raw, table = write_log(tmp_path / "raw")
    example_settings = ExampleSettings(session_length=3, max_history=4)
    manifest = prepare_log(
        raw, tmp_path / "ready", positive=LIKED, settings=example_settings, num_shards=7, rows_per_bucket=50
    )
    assert manifest["settings"]["num_buckets"] == 12
    assert_equals_in_memory(tmp_path / "ready", manifest, table, LIKED, example_settings)


def test_prefixes(tmp_path):
    raw, table = write_log(tmp_path / "raw")
    example_settings = ExampleSettings(session_length=2, max_history=6, train_on="prefixes")
    manifest = prepare_log(raw, tmp_path / "ready", settings=example_settings, num_shards=3, rows_per_bucket=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, split = in_memory(table, PositiveFeedback(), example_settings)
    expected = prefix_examples(split.train_sequences, 2, 6).to_list()
    names = ("user_id", "history", "sessions", "history_lengths")
    found = [row for shard in manifest["train"] for row in examples(tmp_path / "ready" / shard["file"], names)]
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_the_same_command_writes_the_same_bytes_and_another_seed_another_order(tmp_path):
    raw, _ = write_log(tmp_path / "raw")
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        prepare_log(raw, tmp_path / name, num_shards=2, rows_per_bucket=100, seed=seed)
    one, two, three = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two", "three")
    )
    assert one == two
    shard = "train-00000-of-00002.parquet"
    assert one[shard] != three[shard]
    assert one["test.parquet"] == three["test.parquet"]
    # Users are spread: a shard does not hold them one after the other.
    users = pq.read_table(tmp_path / "one" / shard)["user_id"].to_numpy()
    assert (np.diff(users) != 0).mean() > 0.5


def test_it_does_not_replace_what_it_has_not_written(tmp_path):
    raw, _ = write_log(tmp_path / "raw")
    ready = tmp_path / "ready"
    first = prepare_log(raw, ready, num_shards=2)
    with pytest.raises(FileExistsError, match="exists; choose another folder, or pass --overwrite"):
        prepare_log(raw, ready, num_shards=2)
    second = prepare_log(raw, ready, num_shards=3, overwrite=True)
    assert first["settings_sha256"] != second["settings_sha256"]
    assert sorted(path.name for path in ready.glob("train*")) == [shard["file"] for shard in second["train"]]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a prepared folder"):
        prepare_log(raw, tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "raw", "ready"]


def test_a_run_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    raw, _ = write_log(tmp_path / "raw")
    ready = tmp_path / "ready"
    manifest = prepare_log(raw, ready, num_shards=2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(passes.Writers, "write", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_log(raw, ready, num_shards=2, overwrite=True)
    assert json.loads((ready / "prepared.json").read_text()) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "ready"]


BAD = {
    "null ids": ({"item_id": [1, None, 3]}, r"column 'item_id': 1 of 3 ids are null \(first: row 1, None"),
    "fractions": (
        {"user_id": [1.0, 2.0, 2.5]},
        r"'user_id': 1 of 3 ids are not exact 64-bit integers \(first: row 2, 2.5",
    ),
    "lists": ({"user_id": [[1], [2], [3]]}, r"column 'user_id': ids must be integers or strings, not List"),
    "nan": (
        {"timestamp": [1.0, np.nan, np.inf]},
        r"'timestamp': 2 of 3 timestamps are neither finite numbers .*first: row 1",
    ),
    "words": (
        {"timestamp": ["1", "2", "soon"]},
        r"1 of 3 timestamps are neither finite numbers .*\(first: row 2, 'soon'",
    ),
    "booleans": ({"timestamp": [True, False, True]}, "timestamps must be numbers or datetimes, not Boolean"),
    "text feedback": (
        {"like": ["yes", "no", "no"]},
        r"column 'like': 3 of 3 values are not numbers \(first: row 0, 'yes'",
    ),
    "no positive": ({"like": [0, 0, 0.5]}, r"none of 3 rows has like >= 1 \(found: like at most 0.5\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_rows_are_counted(tmp_path, bad):
    columns, message = BAD[bad]
    table = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": [1, 2, 3], "like": [1, 1, 1], **columns}
    pd.DataFrame(table).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=message):
        prepare_log(tmp_path / "log.parquet", tmp_path / "ready", positive=LIKED)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_bad_text(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp,like\n1,a,1,1\n,b,2,1\n1,c,3,much\n")
    with pytest.raises(DataError, match=r"column 'user_id': 1 of 3 ids are null \(first: row 1"):
        prepare_log(log, tmp_path / "ready")
    log.write_text("user_id,item_id,timestamp,like\n1,a,1,1\n1,b,2,NA\n1,c,3,much\n")
    with pytest.raises(DataError, match=r"column 'like': 1 of 3 values are not numbers \(first: row 2, 'much'"):
        prepare_log(log, tmp_path / "ready", positive=LIKED)
    log.write_text("user_id,item_id,timestamp\n1,a,1,1\n")
    with pytest.raises(DataError, match=r"log.csv: cannot be read as csv: found more fields"):
        prepare_log(log, tmp_path / "ready")
    log.write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match="has no rows"):
        prepare_log(log, tmp_path / "ready")


def test_bad_files(tmp_path):
    table = pd.DataFrame({"who": [1], "item_id": [2], "timestamp": [3]})
    table.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"log.parquet: no column 'user_id' among: who, item_id, timestamp"):
        prepare_log(tmp_path / "log.parquet", tmp_path / "ready")
    with pytest.raises(DataError, match="no column 'like'"):
        prepare_log(tmp_path / "log.parquet", tmp_path / "ready", user_column="who", positive=LIKED)
    with pytest.raises(DataError, match="no such file, folder or pattern with log files"):
        prepare_log(tmp_path / "*.csv", tmp_path / "ready")
    (tmp_path / "notes.parquet").write_text("not Parquet at all")
    with pytest.raises(DataError, match=r"notes.parquet: cannot be read as parquet"):
        prepare_log(tmp_path / "notes.parquet", tmp_path / "ready")
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"files of several formats \(.csv, .parquet\) in one folder"):
        prepare_log(tmp_path, tmp_path / "ready")
    (tmp_path / "log.xls").write_text("")
    with pytest.raises(DataError, match="unsupported suffix"):
        prepare_log(tmp_path / "log.xls", tmp_path / "ready")
    with pytest.raises(DataError, match="none of 1 items has that many positive interactions"):
        prepare_log(tmp_path / "log.parquet", tmp_path / "ready", user_column="who")
    with pytest.raises(DataError, match="none of 1 users has 3 items"):
        prepare_log(
            tmp_path / "log.parquet",
            tmp_path / "ready",
            user_column="who",
            settings=ExampleSettings(min_item_interactions=1),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.parquet", "log.xls", "notes.parquet"]
