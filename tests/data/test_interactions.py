"""Reading interactions and items: what is kept exactly, and every message about what cannot be used."""

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import DataError, canonical_ids, read_interactions, read_items


def table(**columns):
    rows = {"user_id": [1, 1, 2], "item_id": ["a", "b", "a"], "timestamp": [3, 1, 2]}
    return pd.DataFrame(rows | columns)


def write_csv(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


class TestIds:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (["00123", "123"], ["00123", "123"]),
            (["123", "7"], ["123", "7"]),  # strings in memory stay strings
            (["é", "東京", ""], ["é", "東京", ""]),
            (np.array([3, 2], dtype=np.uint8), [3, 2]),
            (pd.array([3, 2], dtype="Int64"), [3, 2]),
            (pd.Series([3, 2], dtype=object), [3, 2]),
            (pd.Categorical(["b", "a"]), ["b", "a"]),
            (pd.Categorical([5, 4]), [5, 4]),
            ([3.0, -2.0], [3, -2]),
            ([2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ],
    )
    def test_kept_exactly(self, values, expected):
        ids = canonical_ids(pd.Series(values), "item_id")
        assert ids.tolist() == expected
        assert ids.dtype == (object if isinstance(expected[0], str) else np.int64)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (["a", None, None], r"'item_id': 2 of 3 ids are null \(first: row 1, counting from 0\)"),
            ([1.0, np.nan], "1 of 2 ids are null"),
            ([1, 2, "x"], r"mixed types: 2 int, 1 str \(first of the rarest: row 2, 'x'\).*astype"),
            ([1.0, 2.5], r"floats, and 1 of 2 are not exact integers \(first: row 1, 2.5\)"),
            ([1.0, np.inf], "not exact integers"),
            ([2.0**60], "not exact integers"),
            (np.array([2**24 + 1], dtype=np.float32), "not exact integers"),
            ([True, False], "booleans"),
            ([2**64], "exceed 64 bits"),
            (np.array([2**63], dtype=np.uint64), "exceed 64 bits"),
            ([(1, 2), (3, 4)], "must be integers or strings, not 2 tuple"),
            (pd.to_datetime(["2020-01-01"]), "must be integers or strings"),
        ],
    )
    def test_refused(self, values, message):
        with pytest.raises(DataError, match=message):
            canonical_ids(pd.Series(values), "item_id")

    @settings(deadline=None, max_examples=40)
    @given(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1), min_size=1, max_size=8
        )
    )
    def test_text_survives_a_csv(self, tmp_path_factory, ids):
        path = tmp_path_factory.mktemp("csv") / "rows.csv"
        frame = pd.DataFrame({"user_id": "u", "item_id": [*ids, "01"], "timestamp": range(len(ids) + 1)})
        frame.to_csv(path, index=False, lineterminator="\n")
        assert read_interactions(path)["item_id"].tolist() == [*ids, "01"]

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            (["123", "-4", "0"], [123, -4, 0]),
            (["00123", "4"], ["00123", "4"]),
            (["+1", "2"], ["+1", "2"]),
            ([" 1", "2"], [" 1", "2"]),
            (["-0", "2"], ["-0", "2"]),
            (["1.0", "2"], ["1.0", "2"]),
            (["NA", "null"], ["NA", "null"]),
            (["٣", "2"], ["٣", "2"]),
            (["9" * 25, "2"], ["9" * 25, "2"]),
        ],
    )
    def test_csv_integers_only_when_canonical(self, tmp_path, ids, expected):
        rows = "".join(f"u,{item},{t}\n" for t, item in enumerate(ids))
        path = write_csv(tmp_path, "user_id,item_id,timestamp\n" + rows)
        assert read_interactions(path)["item_id"].tolist() == expected


class TestReadInteractions:
    def test_sorted_stably_and_renamed(self):
        rows = pd.DataFrame({"u": [2, 1, 1, 1], "i": [9, 8, 7, 6], "t": [0, 5, 5, 1], "like": [1, 0, 0, 1], "x": 0})
        result = read_interactions(
            rows, user_column="u", item_column="i", timestamp_column="t", feedback_columns=["like"]
        )
        assert list(result) == ["user_id", "item_id", "timestamp", "like"]
        assert result["item_id"].tolist() == [6, 8, 7, 9]
        assert result.index.tolist() == [0, 1, 2, 3]
        assert rows["i"].tolist() == [9, 8, 7, 6]

    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
    def test_files_agree_with_the_frame(self, tmp_path, suffix):
        frame = table(item_id=["007", "ü", "NA"], rating=[4.5, np.nan, 3.0])
        path = tmp_path / f"rows{suffix}"
        if suffix == ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        elif suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
        expected = read_interactions(frame)
        pd.testing.assert_frame_equal(read_interactions(path), expected)
        pd.testing.assert_frame_equal(read_interactions(str(path)), expected)

    def test_dataset(self):
        frame = table()
        result = read_interactions(datasets.Dataset.from_pandas(frame).select([2, 0, 1]))
        pd.testing.assert_frame_equal(result, read_interactions(frame))

    def test_csv_with_byte_order_mark(self, tmp_path):
        path = write_csv(tmp_path, "\ufeffuser_id,item_id,timestamp\n1,2,3\n")
        assert read_interactions(path)["user_id"].tolist() == [1]

    @pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
    def test_datetimes_become_seconds_but_sort_finely(self, unit):
        times = pd.to_datetime(["1970-01-01 00:01:00.5", "1970-01-01 00:01:00.2", "1969-12-31 23:59:59.0"])
        result = read_interactions(table(user_id=1, timestamp=times.astype(f"datetime64[{unit}]")))
        assert result["timestamp"].tolist() == [-1, 60, 60]
        assert result["timestamp"].dtype == np.int64
        assert result["item_id"].tolist() == (["a", "a", "b"] if unit == "s" else ["a", "b", "a"])

    def test_time_zones_are_utc(self):
        times = pd.to_datetime(["1970-01-01 01:00"] * 3).tz_localize("Europe/Berlin")
        assert read_interactions(table(timestamp=times))["timestamp"].tolist() == [0, 0, 0]

    def test_fractional_seconds_sort_before_they_are_cut(self):
        result = read_interactions(table(user_id=1, timestamp=[1.9, 1.1, 0.5]))
        assert result["timestamp"].tolist() == [0, 1, 1]
        assert result["item_id"].tolist() == ["a", "b", "a"]

    def test_large_integer_timestamps_are_exact(self):
        big = 2**53 + 1
        assert read_interactions(table(timestamp=[big, big + 2, big + 4]))["timestamp"].max() == big + 4

    def test_session_column(self):
        assert read_interactions(table(visit=["x", "y", "z"]), session_column="visit")["session_id"].tolist() == [
            "y",
            "x",
            "z",
        ]
        assert list(read_interactions(table(like=1, session_id=[1, 2, 3])))[3:] == ["session_id", "like"]
        with pytest.raises(DataError, match="'session_id': 1 of 3 ids are null"):
            read_interactions(table(session_id=["x", None, "z"]))

    def test_exact_duplicates_dropped_and_counted(self):
        rows = pd.concat([table(tags=[["x"], ["y"], ["x"]])] * 2)
        with pytest.warns(UserWarning, match=r"dropped 3 of 6 rows .*first: row 3"):
            assert len(read_interactions(rows)) == 3

    def test_a_different_column_is_no_duplicate(self):
        rows = pd.DataFrame({"user_id": 1, "item_id": 2, "timestamp": 3, "review": ["x", "y"]})
        with pytest.warns(UserWarning, match="1 of 2 rows equal an earlier row but for review, .* are kept"):
            assert len(read_interactions(rows, feedback_columns=[])) == 2

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            ([1, np.nan, 2], r"'timestamp': 1 of 3 timestamps are neither finite .*row 1, nan"),
            ([1, 2, np.inf], "row 2, inf"),
            ([1e300, 2, 3], "row 0, 1e"),
            (["1", "soon", "then"], r"2 of 3 .*row 1, 'soon'.*to_datetime"),
            (["1", "soon", "2020-01-01"], "1 of 3 timestamps are numbers and the others dates .*row 0, '1'"),
            ([True, False, True], "booleans"),
            (pd.to_datetime(["2020-01-01", None, "2020-01-02"]), "1 of 3 timestamps"),
            ([None, None, None], "3 of 3"),
        ],
    )
    def test_bad_timestamps(self, times, message):
        with pytest.raises(DataError, match=message):
            read_interactions(table(timestamp=times))

    def test_missing_column_lists_what_is_there(self):
        with pytest.raises(DataError, match="no column 'userId' among: user_id, item_id, timestamp"):
            read_interactions(table(), user_column="userId")
        with pytest.raises(DataError, match="no column 'like' among"):
            read_interactions(table(), feedback_columns=["like"])

    def test_colliding_column(self):
        with pytest.raises(DataError, match="'item_id' conflicts with"):
            read_interactions(table(movie=[1, 2, 3]), item_column="movie")
        assert len(read_interactions(table(movie=[1, 2, 3]), item_column="movie", feedback_columns=[])) == 3

    def test_bad_sources(self, tmp_path):
        cases = [
            (tmp_path, "is a folder"),
            (tmp_path / "none.csv", "no such file"),
            (tmp_path / "rows.xlsx", r"unsupported suffix '.xlsx'. Supported: .csv, .tsv"),
            (write_csv(tmp_path, "", "empty.csv"), "no rows"),
            (write_csv(tmp_path, "user_id,item_id,timestamp\n", "header.csv"), "no rows"),
            (write_csv(tmp_path, "user_id,item_id,timestamp\n1,2,3,4\n", "wide.csv"), "line 2 has 4 fields"),
            (write_csv(tmp_path, "{not json\n", "bad.jsonl"), "cannot be read as jsonl"),
            (write_csv(tmp_path, "PAR?", "bad.parquet"), "cannot be read as parquet"),
            (table().iloc[:0], "no rows"),
            (pd.concat([table(), table()["item_id"]], axis=1), "'item_id' occurs more than once"),
            ({"user_id": [1]}, "cannot read a table from dict"),
            (datasets.DatasetDict(train=datasets.Dataset.from_pandas(table())), "one split"),
        ]
        for source, message in cases:
            with pytest.raises(DataError, match=message):
                read_interactions(source)

    def test_empty_field_is_a_null_id(self, tmp_path):
        path = write_csv(tmp_path, "user_id,item_id,timestamp\nu,a,1\nu,,2\n")
        with pytest.raises(DataError, match=r"'item_id': 1 of 2 ids are null \(first: row 1"):
            read_interactions(path)


class TestReadItems:
    def test_keeps_order_text_and_lists(self):
        frame = pd.DataFrame({"asin": ["z", "a"], "title": ["Z", None], "tags": [["x"], []]})
        items = read_items(frame, item_column="asin")
        assert items.item_ids.tolist() == items.frame["item_id"].tolist() == ["z", "a"]
        assert list(items.frame) == ["item_id", "title", "tags"]
        assert items.embeddings is None

    def test_csv_text_is_exact(self, tmp_path):
        path = write_csv(tmp_path, "item_id,title\n1,NA\n2,007\n")
        assert read_items(path, text_columns=["title"]).frame["title"].tolist() == ["NA", "007"]

    def test_embeddings_from_lists_arrays_and_files(self, tmp_path):
        matrix = np.arange(6, dtype=np.float16).reshape(3, 2)
        frame = pd.DataFrame({"item_id": [5, 6, 7], "vector": list(matrix)})
        np.save(tmp_path / "e.npy", matrix.astype(np.float32))
        for items in (
            read_items(frame, embedding_column="vector"),
            read_items(frame, text_columns=[], embeddings=matrix),
            read_items(frame, text_columns=[], embeddings=tmp_path / "e.npy"),
        ):
            assert list(items.frame) == ["item_id"]
            assert items.embeddings.dtype == np.float32
            np.testing.assert_array_equal(items.embeddings, matrix)
        assert isinstance(items.embeddings, np.memmap)
        chosen = items.select([7, 5])
        assert chosen.frame["item_id"].tolist() == [7, 5]
        np.testing.assert_array_equal(chosen.embeddings, matrix[[2, 0]])

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([1, 2, 1, 2], r"'item_id': 2 of 4 rows duplicate an earlier item id \(first: row 2, 1\)"),
            ([1, None, 2, 3], "1 of 4 ids are null"),
            ([1, "a", 2, 3], "mixed types"),
        ],
    )
    def test_bad_ids(self, ids, message):
        with pytest.raises(DataError, match=message):
            read_items(pd.DataFrame({"item_id": ids}))

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            (np.array([[1.0], [np.nan], [np.inf]]), r"2 of 3 rows contain NaN or infinity \(first: item 'b'\)"),
            (np.ones((2, 4)), "2 rows for 3 items"),
            (np.ones(3), r"got shape \(3,\)"),
            (np.array([["x"]] * 3), "real numbers"),
        ],
    )
    def test_bad_arrays(self, embeddings, message):
        with pytest.raises(DataError, match=message):
            read_items(pd.DataFrame({"item_id": ["a", "b", "c"]}), embeddings=embeddings)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([[1.0, 2.0], [1.0], [1.0, 2.0, 3.0]], "2 of 3 embeddings .*item 'b': 1 numbers, expected 2"),
            ([[1.0], None, [2.0]], "item 'b': not a list"),
            ([[], [], []], "expected one number or more"),
            ([["x"], ["y"], ["z"]], "lists of numbers"),
            ([[1.0], [np.nan], [2.0]], "1 of 3 rows contain NaN"),
        ],
    )
    def test_bad_lists(self, rows, message):
        with pytest.raises(DataError, match=message):
            read_items(pd.DataFrame({"item_id": ["a", "b", "c"], "e": rows}), embedding_column="e")

    def test_bad_embedding_sources(self, tmp_path):
        frame = pd.DataFrame({"item_id": [1], "e": [[1.0]]})
        np.save(tmp_path / "o.npy", np.array([[{}]], dtype=object), allow_pickle=True)
        for path in (tmp_path / "o.npy", tmp_path / "none.npy"):
            with pytest.raises(DataError, match=r"cannot be read as .npy"):
                read_items(frame, embeddings=path)
        with pytest.raises(DataError, match="Pass only one"):
            read_items(frame, embedding_column="e", embeddings=np.ones((1, 1)))

    def test_select_names_the_missing(self):
        items = read_items(pd.DataFrame({"item_id": [1, 2]}))
        assert len(items.select([])) == 0
        with pytest.raises(
            DataError, match=r"4 of 5 interacted items have no row in the item table \(first: 9, 8, 7\)"
        ):
            items.select([9, 1, 8, 7, 6])
        with pytest.raises(DataError, match="ids are strings, the item table's integers"):
            items.select(["1"])
