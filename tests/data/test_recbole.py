"""RecBole's atomic files: read as they stand, written so that RecBole and we read them back, refused with one reason."""

import csv
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas._libs.parsers import STR_NA_VALUES

from onerec_hf.data import (
    DataError,
    ItemTable,
    PositiveFeedback,
    RecommendationData,
    load_files,
    load_source,
    read_interactions,
    read_items,
    read_recbole,
    write_recbole,
)

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t302\t3.5\t891717742\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tvector:float_seq\n"
    "242\tToy  Story\t1995\tAnimation Children's Comedy\t0.5 1e-3\n"
    '302\t"Great Performances" Cats\tunkonwn\t\t2 -1\n'
)


def write(tmp_path, text, name="x.inter"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def recbole_reads(path):
    """As RecBole's `Dataset._load_feat` does: pandas with default quoting and missing words, tokens split at blanks."""
    types = [field.split(":") for field in path.read_text(encoding="utf-8").split("\n", 1)[0].split("\t")]
    dtype = {f"{name}:{kind}": np.float64 if kind == "float" else str for name, kind in types}
    table = pd.read_csv(path, delimiter="\t", dtype=dtype, encoding="utf-8", engine="python")
    table.columns = [name for name, _ in types]
    for name, kind in types:
        if kind == "token_seq":
            table[name] = [list(filter(None, text.split(" "))) for text in table[name].fillna("")]
    return table


class TestRead:
    def test_movielens_form(self, tmp_path):
        write(tmp_path, INTER, "ml/ml.inter")
        write(tmp_path, ITEM, "ml/ml.item")
        for data in (read_recbole(tmp_path / "ml"), read_recbole(tmp_path / "ml/ml.inter", tmp_path / "ml/ml.item")):
            assert data.name == "ml"
            assert data.interactions.to_dict("list") == {
                "user_id": [186, 196],
                "item_id": [302, 242],
                "timestamp": [891717742, 881250949],
                "rating": [3.5, 3.0],
            }
            frame = data.items.frame
            assert frame["item_id"].tolist() == [242, 302]
            assert frame["movie_title"].tolist() == ["Toy Story", '"Great Performances" Cats']
            assert frame["release_year"].tolist() == ["1995", "unkonwn"]
            assert frame["class"].isna().tolist() == [False, True]
            assert frame["text"].tolist() == [
                "Toy Story | 1995 | Animation Children's Comedy",
                '"Great Performances" Cats | unkonwn',
            ]
            np.testing.assert_array_equal(np.stack(frame["vector"]), [[0.5, 1e-3], [2, -1]])
        assert read_recbole(tmp_path / "ml/ml.inter").items is None

    def test_the_other_readers_take_atomic_files(self, tmp_path):
        inter, item = write(tmp_path, INTER), write(tmp_path, ITEM, "x.item")
        data = load_files(
            inter,
            item,
            text_columns=["movie_title"],
            embedding_column="vector",
            positive=PositiveFeedback({"rating": 3.2}),
        )
        assert data.positive.apply(data.interactions)["item_id"].tolist() == [302]
        np.testing.assert_array_equal(data.items.embeddings, np.array([[0.5, 1e-3], [2, -1]], dtype=np.float32))
        assert len(read_interactions(str(inter))) == len(read_items(item)) == 2

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            (["12", "-4"], [12, -4]),
            (["012", "4"], ["012", "4"]),
            (["NA", "null"], ["NA", "null"]),
            (['"q', '"'], ['"q', '"']),
            ([" a ", "b\u2028c"], [" a ", "b\u2028c"]),
            (["é,;|", "\x0c"], ["é,;|", "\x0c"]),
        ],
    )
    def test_ids_are_kept(self, tmp_path, ids, expected):
        rows = "".join(f"{item}\t{item}\t{t}\n" for t, item in enumerate(ids))
        path = write(tmp_path, "user_id:token\titem_id:token\ttimestamp:float\n" + rows)
        data = read_interactions(path).sort_values("timestamp")
        assert data["item_id"].tolist() == data["user_id"].tolist() == expected

    def test_line_ends_blank_lines_and_byte_order_mark(self, tmp_path):
        text = "\ufeff" + INTER.replace("\n", "\r\n") + "\r\n\r\n"
        assert read_interactions(write(tmp_path, text))["rating"].tolist() == [3.5, 3.0]

    def test_names_of_columns(self, tmp_path):
        path = write(tmp_path, INTER.replace("user_id", "who").replace("timestamp", "at"))
        assert len(read_recbole(path, user_column="who", timestamp_column="at").interactions) == 2
        with pytest.raises(DataError, match="no column 'user_id', 'timestamp' among: who, item_id, rating, at"):
            read_recbole(path)

    def test_missing_and_large_numbers(self, tmp_path):
        text = "item_id:token\tprice:float\tcount:float\tv:float_seq\n1\t\t18446744073709551616\t\n2\tNA\t1\t1\n"
        frame = read_items(write(tmp_path, text, "x.item")).frame
        assert frame["price"].isna().all()
        assert frame["count"].tolist() == [2.0**64, 1.0]
        assert [row.tolist() for row in frame["v"]] == [[], [1.0]]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "the header is empty"),
            ("\n1\t2\n", "the header is empty"),
            ("user_id\titem_id:token\n", "field 1 of the header, 'user_id', is not name:type"),
            ("user_id:token\t:float\n", "field 2 of the header, ':float', is not name:type"),
            ("user_id:token,item_id:token\n1,2\n", "is not name:type.*separate the fields by tabs"),
            (
                "user_id:token\titem_id:int\n",
                "field 2 of the header, 'item_id:int', has the unknown type 'int'. Use one of token, token_seq",
            ),
            ("a:token\ta:float\n", "column 'a' occurs more than once"),
            (INTER.split("\n")[0], "no rows"),
            (
                INTER + "1\t2\t3\n1\t2\n",
                r"2 of 4 lines do not have 4 fields like the header \(first: line 4 has 3\)",
            ),
            (INTER + "1\t2\t3\t4\t5\n", "line 4 has 5"),
            (INTER + "\n" + "1\t2\t3\t4\n", "line 4 has 0"),
            (
                INTER + "1\t2\tgood\t4\n",
                r"column 'rating:float': 1 of 3 values are not numbers \(first: line 4, 'good'\)",
            ),
            (
                INTER.replace("3\t8", "True\t8").replace("3.5", "False"),
                "2 of 2 values are not numbers .*line 2, 'True'",
            ),
            (
                "a:token\tv:float_seq\n1\t1 2\n2\t1 x\n",
                r"column 'v:float_seq': 1 of 2 values are not numbers \(first: line 3, '1 x'\)",
            ),
            (INTER + "\t2\t3\t4\n", r"'user_id': 1 of 3 ids are null \(first: row 2"),
            ("user_id:token\titem_id:token\n1\t2\n", "no column 'timestamp'"),
            (b"user_id:token\n\xff\n", "not valid UTF-8"),
        ],
    )
    def test_refuses(self, tmp_path, text, words):
        with pytest.raises(DataError, match=words):
            read_recbole(write(tmp_path, text))

    def test_refuses_what_is_not_there(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=r"empty.inter: no such file"):
            read_recbole(tmp_path / "empty")
        with pytest.raises(DataError, match="1 of 2 interacted items have no row"):
            read_recbole(write(tmp_path, INTER), write(tmp_path, "item_id:token\n242\n", "x.item"))


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
ids = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\r\n"), min_size=1).filter(
    lambda text: not text.startswith('"') and text not in STR_NA_VALUES and not re.fullmatch(r"-?[0-9]+", text)
)
number = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False))


class TestWrite:
    @settings(deadline=None, max_examples=40)
    @given(st.data())
    def test_round_trip(self, tmp_path_factory, data):
        size = data.draw(st.integers(1, 6))

        def column(values):
            return data.draw(st.lists(values, min_size=size, max_size=size))

        rows = pd.DataFrame(
            {
                "user_id": column(ids),
                "item_id": column(st.integers(-(2**63), 2**63 - 1)),
                "timestamp": column(st.integers(-(2**62), 2**62)),
                "rating": pd.Series(column(number), dtype=float),
                "like": column(st.booleans()),
                "review": pd.Series(column(st.one_of(st.none(), texts)), dtype=object),
            }
        ).drop_duplicates(subset=["user_id", "item_id", "timestamp"])
        interactions = read_interactions(rows)
        folder = tmp_path_factory.mktemp("r")
        write_recbole(interactions, folder, "r")
        assert [path.name for path in folder.iterdir()] == ["r.inter"]
        back = read_recbole(folder / "r.inter").interactions
        for name in ("user_id", "item_id", "timestamp", "rating", "like"):
            assert back[name].tolist() == interactions[name].tolist()
        reviews = [str(value).split() for value in back["review"].astype(object).fillna("")]
        assert reviews == [(value or "").split() for value in interactions["review"]]

    def test_what_recbole_sees(self, tmp_path):
        interactions = read_interactions(
            pd.DataFrame(
                {
                    "user_id": ["u 1", "u 1", "ü"],
                    "item_id": [10, 2, 2],
                    "timestamp": [2**53 + 2, 5, 7],
                    "session_id": [3, 4, 4],
                    "rating": [0.1, np.nan, np.float32(0.1)],
                    "like": pd.array([1, None, 0], dtype="Int64"),
                    "device": pd.Categorical(["tv", "phone", "tv"]),
                }
            )
        )
        frame = pd.DataFrame(
            {
                "item_id": [10, 2],
                "title": ['"Great Performances"\tCats', "It"],
                "brand": ['"X"', None],
                "categories": [["Beauty > Hair", "Skin"], []],
                "vector": [np.array([0.5, 1.0]), np.array([1e-8, -3])],
            }
        )
        items = ItemTable(frame["item_id"].to_numpy(), frame, np.ones((2, 3), np.float32))
        data = RecommendationData("mine", interactions, items)
        write_recbole(data, tmp_path / "mine", "mine")
        header = (tmp_path / "mine/mine.inter").read_text().split("\n")[0]
        assert header == (
            "user_id:token\titem_id:token\ttimestamp:float\tsession_id:token\trating:float\tlike:float\tdevice:token"
        )
        seen = recbole_reads(tmp_path / "mine/mine.inter")
        assert seen["user_id"].tolist() == ["u 1", "u 1", "ü"]
        assert seen["item_id"].tolist() == ["2", "10", "2"]
        assert seen["timestamp"].tolist() == [5, 2**53 + 2, 7]
        assert seen["rating"].tolist()[1:] == [0.1, float(np.float32(0.1))]
        assert seen["like"].tolist()[1:] == [1, 0]
        assert seen["device"].tolist() == ["phone", "tv", "tv"]
        seen = recbole_reads(tmp_path / "mine/mine.item")
        assert list(seen) == ["item_id", "title", "brand", "categories", "vector"]
        assert seen["title"].tolist() == [['"Great', 'Performances"', "Cats"], ["It"]]
        assert seen["brand"].tolist() == [['"X"'], []]
        assert seen["categories"].tolist() == [["Beauty", ">", "Hair", "Skin"], []]
        assert seen["vector"].tolist() == ["0.5 1.0", "1e-08 -3.0"]

        back = read_recbole(tmp_path / "mine")
        pd.testing.assert_frame_equal(
            back.interactions.drop(columns=["like", "device"]),
            interactions.drop(columns=["like", "device"]),
            check_dtype=False,
        )
        assert back.items.frame["title"].tolist() == ['"Great Performances" Cats', "It"]
        np.testing.assert_array_equal(np.stack(back.items.frame["vector"]), np.stack(frame["vector"]))
        assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["mine.inter", "mine.item"]

    @pytest.mark.filterwarnings("ignore:items. 2 of 9,066 items have no text")
    def test_a_named_source_survives(self, tmp_path):
        data = load_source("movielens")
        write_recbole(data, tmp_path / "ml", "ml")
        back = read_recbole(tmp_path / "ml")
        pd.testing.assert_frame_equal(back.interactions, data.interactions)
        assert back.items.item_ids.tolist() == data.items.item_ids.tolist()
        assert back.items.frame["text"].tolist() == [" ".join(text.split()) for text in data.items.frame["text"]]
        assert recbole_reads(tmp_path / "ml/ml.inter")["rating"].tolist() == data.interactions["rating"].tolist()
        with open(tmp_path / "ml/ml.item", encoding="utf-8") as file:
            assert sum(1 for _ in csv.reader(file, delimiter="\t", strict=True)) == len(data.items) + 1

    @pytest.mark.parametrize(
        ("columns", "words"),
        [
            (
                {"user_id": ["a\tb"]},
                r"'user_id': 1 of 1 ids would be misread by RecBole \(first: 'a\\tb'\)",
            ),
            ({"item_id": ["a\nb"]}, "'item_id': 1 of 1 ids"),
            ({"item_id": ['"a']}, "a leading quote"),
            ({"user_id": ["NA"]}, "first: 'NA'"),
            ({"user_id": [None]}, "1 of 1 ids are null"),
            ({"a:b": [1]}, "'a:b' is not a valid column name"),
            ({"a\tb": [1]}, "is not a valid column name"),
            ({"x": [{}]}, r"column 'x': its values match no type of an atomic file \(dtype object\)"),
            ({"x": [[1, "a"]]}, "column 'x': its values match no type"),
            ({"x": pd.to_datetime(["2020-01-01"])}, "column 'x': its values match no type .*datetime64"),
        ],
    )
    def test_refuses(self, tmp_path, columns, words):
        rows = pd.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]} | columns)
        with pytest.raises(DataError, match=words):
            write_recbole(rows, tmp_path, "x")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("word", sorted(STR_NA_VALUES))
    def test_refuses_ids_that_recbole_takes_as_missing(self, tmp_path, word):
        with pytest.raises(DataError, match="would be misread by RecBole"):
            write_recbole(pd.DataFrame({"user_id": [word], "item_id": ["i"], "timestamp": [1]}), tmp_path, "x")

    def test_refuses_tables(self, tmp_path):
        rows = pd.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]})
        with pytest.raises(DataError, match="interactions: no column 'timestamp'"):
            write_recbole(rows.drop(columns="timestamp"), tmp_path, "x")
        with pytest.raises(DataError, match="interactions: the table has no rows"):
            write_recbole(rows.iloc[:0], tmp_path, "x")
        bad = pd.DataFrame({"item_id": ["i"], "x": [{}]})
        data = RecommendationData("x", rows, ItemTable(bad["item_id"].to_numpy(), bad))
        with pytest.raises(DataError, match="column 'x'"):
            write_recbole(data, tmp_path, "x")
        assert list(tmp_path.iterdir()) == []  # not even the interactions
