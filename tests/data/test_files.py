"""Files as people have them: unquoted, compressed, without a header, one line per user, without times, under other names."""

import gzip
import re
import warnings

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import DataError, load_files, prepare_log, read_interactions, read_items
from onerec_hf.data.quoting import quoting
from onerec_hf.data.tables import load_table
from tests.data.test_types import in_memory, prepared

ROWS = "1,a,3\n1,b,1\n1,c,2\n"
IN_ORDER = [(1, "b"), (1, "c"), (1, "a")]
NAMES = ["user_id", "item_id", "timestamp"]


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_titles_that_begin_with_a_quote_hide_no_rows(tmp_path, suffix):
    separator = "\t" if suffix == ".tsv" else ","
    titles = ["Heat", '"Rolling in the deep', "Alien", '5" disk', '"Heroes', 'Say "yes"', '"Both"', "Low"]
    lines = [separator.join(["item_id", "title", "year"])]
    lines += [separator.join([str(k), title, "1990"]) for k, title in enumerate(titles)]
    items = read_items(write(tmp_path / f"items{suffix}", "\n".join(lines) + "\n"))
    assert items.item_ids.tolist() == list(range(8))
    assert items.frame["title"].tolist() == titles


@pytest.mark.parametrize(("text", "line"), [("1\ta\tb\n2\tc\n", 2), ("1\ta\n2\tc\n3\td\te\tf\n", 4)])
def test_a_row_with_too_many_fields_is_named_by_its_line(tmp_path, text, line):
    with pytest.raises(DataError, match=rf"items\.tsv.*line {line}\b"):
        read_items(write(tmp_path / "items.tsv", f"item_id\ttitle\n{text}"))


def test_ids_that_begin_with_a_quote(tmp_path):
    rows = [(1, each, k) for k, each in enumerate(["a", '"q', "b", "c", "d", '"r', "e"])]
    path = write(tmp_path / "log.tsv", "\t".join(NAMES) + "\n" + "".join(f"{u}\t{i}\t{t}\n" for u, i, t in rows))
    assert in_memory(path) == prepared(path) == [(u, i) for u, i, _ in rows]


def test_a_quoted_file_that_is_not_closed_is_refused(tmp_path):
    path = write(tmp_path / "items.csv", 'item_id,title\n1,"Hello, world"\n2,"Heroes\n3,Low\n4,"Helden\n')
    for read in (read_items, lambda path: list(prepared(path, user_column="title", timestamp_column=None))):
        with pytest.raises(DataError, match=r"line [345].*Double the quotes"):
            read(path)


def test_lines_that_can_be_read_in_two_ways_are_said(tmp_path):
    with pytest.warns(
        UserWarning, match="line 2: a field begins with a quote, and a later line ends one; each of its lines is a row"
    ):
        assert len(read_items(write(tmp_path / "a.tsv", 'item_id\ttitle\n1\t"a\n2\tb"\n'))) == 2
    with pytest.warns(UserWarning, match="its lines are one field"):
        assert len(read_items(write(tmp_path / "a.csv", 'item_id,title\n1,"a\n2,b"\n'))) == 1


FIELD = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], include_characters="\n\t"), max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(FIELD, st.sampled_from(['"', 'a"', '"a', "a,b", "a\nb", 'a""b'])), min_size=1, max_size=5))
def test_what_pandas_writes_is_read(tmp_path_factory, titles):
    path = tmp_path_factory.mktemp("csv") / "items.csv"
    titles = [*titles, "x"]
    frame = pd.DataFrame({"item_id": range(len(titles)), "title": titles, "year": 1990})
    frame.to_csv(path, index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = read_items(path, text_columns=["title"])
    assert items.item_ids.tolist() == frame["item_id"].tolist()
    assert items.frame["title"].fillna("").tolist() == titles


def test_how_fields_are_quoted(tmp_path):
    for text, how in (
        ("a\n", "absent"),
        ('"a"\tb\n', "fields"),
        ('"a\tb"\n"c\td"\te\n', "spanning"),
        ('"a\tb\n', "off"),
    ):
        path = write(tmp_path / "x", text)
        assert quoting(lambda path=path: path.open("rb"), "\t") == how


@pytest.mark.parametrize(
    ("name", "text"),
    [("u.data", ROWS.replace(",", "\t")), ("r.dat", ROWS.replace(",", "::")), ("x.csv", ROWS.replace(",", "|"))],
)
def test_without_a_header(tmp_path, name, text):
    path = write(tmp_path / name, text)
    assert in_memory(path, column_names=NAMES) == prepared(path, column_names=NAMES) == IN_ORDER
    for read in (in_memory, prepared):
        with pytest.raises(DataError, match="If the file has no header, pass --column_names"):
            read(path)
        with pytest.raises(DataError, match="2 column names for 3 fields"):
            read(path, column_names=NAMES[:2])
    with pytest.raises(DataError, match="column names are for text files"):
        load_table(pd.DataFrame({"a": [1]}), names=["a"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("b.txt", "1 5 6 7\n2 7 6\n\n1 8\n"),
        ("b.jsonl", '{"user_id": 1, "item_ids": [5, 6, 7, 8]}\n{"user_id": 2, "item_ids": [7, 6]}\n'),
        (
            "b.json",
            '[{"user_id": 1, "items": [8, 5, 6, 7], "time": [9, 1, 2, 3]}, {"user_id": 2, "items": [7, 6], "time": [1, 1]}]',
        ),
    ],
)
def test_one_line_per_user(tmp_path, name, text):
    path = write(tmp_path / name, text)
    assert in_memory(path) == prepared(path) == [(1, 5), (1, 6), (1, 7), (1, 8), (2, 7), (2, 6)]


def test_users_without_items_are_counted(tmp_path):
    rows = pd.DataFrame({"user_id": [1, 2, 3], "item_id": [["a"], [], None]})
    with pytest.warns(UserWarning, match="2 of 3 rows have no items .first: row 1"):
        assert len(read_interactions(rows)) == 1


def test_without_times_rows_are_in_order(tmp_path):
    path = write(tmp_path / "x.csv", "user_id,item_id\n1,c\n2,b\n1,a\n1,c\n")
    expected = [(1, "c"), (1, "a"), (1, "c"), (2, "b")]
    assert in_memory(path, timestamp_column="none") == prepared(path, timestamp_column=None) == expected
    for read in (in_memory, prepared):
        with pytest.raises(DataError, match=r"no column 'timestamp' among: user_id, item_id.*--timestamp_column none"):
            read(path)


def test_rows_without_values_are_counted(tmp_path):
    path = write(tmp_path / "x.csv", "user_id,item_id,timestamp\n1,a,3\n,,\n1,b,1\n\n1,c,2\n,,\n")
    with pytest.warns(UserWarning, match="left out 2 of 5 rows that have no value .first: row 1"):
        assert len(read_interactions(path)) == 3
    assert prepared(path) == IN_ORDER


def test_other_names_of_columns_are_said(tmp_path):
    path = write(tmp_path / "x.csv", "userId,movieId,unixReviewTime,rating\n07,a,3,5\n07,b,1,4\n")
    with pytest.warns(
        UserWarning, match=r"column '(userId|movieId|unixReviewTime)' is read as (user_id|item_id|timestamp)"
    ) as said:
        assert read_interactions(path)["user_id"].tolist() == ["07", "07"]
    assert len(said) == 3
    assert prepared(path) == [("07", "b"), ("07", "a")]
    both = write(tmp_path / "y.csv", "user_id,asin,parent_asin,time\n1,a,b,3\n")
    for read in (in_memory, prepared):
        with pytest.raises(DataError, match=r"several could be it: 'asin', 'parent_asin'\. Pass --item_column"):
            read(both)


@pytest.mark.parametrize(
    ("header", "cure"),
    [
        ("email,sku,date", "no column 'user_id' among: email, sku, date. Pass --user_column with the right one."),
        (
            "who,what,at",
            "no column 'user_id', 'item_id', 'timestamp' among: who, what, at. Pass --user_column and --item_column and --timestamp_column with the "
            "right ones (--timestamp_column none: the rows of a user are in the order of time).",
        ),
        (
            "customer_id,StockCode,shipped",
            "no column 'timestamp' among: customer_id, StockCode, shipped. Pass --timestamp_column with the right one (--timestamp_column none: the "
            "rows of a user are in the order of time).",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:column .* is read as")
def test_a_column_of_an_unusual_name_is_passed(tmp_path, header, cure):
    path = write(tmp_path / "x.csv", f"{header}\n1,a,3\n")
    for read in (in_memory, prepared):
        with pytest.raises(DataError) as refused:
            read(path)
        assert str(refused.value).endswith(cure)


@pytest.mark.parametrize("time", ["order_date", "InvoiceDate", "played_at", "t_dat"])
@pytest.mark.filterwarnings("ignore:column .* is read as")
def test_times_of_shops_and_players(tmp_path, time):
    path = write(tmp_path / "x.csv", f"customer_id,StockCode,{time}\n07,a,2024-03-02\n07,b,2024-01-02\n")
    assert in_memory(path) == prepared(path) == [("07", "b"), ("07", "a")]


@pytest.mark.parametrize(
    "header",
    ["user_id,product_id,created_at,order_date", "user_id,sku,time,clicked_at", "user,product_id,date,StockCode"],
)
@pytest.mark.filterwarnings("ignore:column .* is read as")
def test_rarer_names_yield(tmp_path, header):
    path = write(tmp_path / "x.csv", f"{header}\n07,a,2024-03-02,2020-01-01\n07,b,2024-01-02,2021-01-01\n")
    assert in_memory(path) == prepared(path) == [("07", "b"), ("07", "a")]


@pytest.mark.filterwarnings("ignore:column .* is read as")
def test_a_date_beside_lists_is_no_time_of_their_items(tmp_path):
    rows = pd.DataFrame({"user_id": ["u"], "items": [["b", "a"]], "purchase_date": ["2024-01-02"]})
    rows.to_parquet(tmp_path / "x.parquet")
    assert in_memory(tmp_path / "x.parquet") == prepared(tmp_path / "x.parquet") == [("u", "b"), ("u", "a")]
    assert read_interactions(rows)["purchase_date"].tolist() == ["2024-01-02"] * 2
    rows = rows.assign(purchase_date=[["2024-01-02", "2024-01-01"]])
    rows.to_parquet(tmp_path / "y.parquet")
    assert in_memory(tmp_path / "y.parquet") == prepared(tmp_path / "y.parquet") == [("u", "a"), ("u", "b")]


def test_the_cure_is_one_that_works(tmp_path):
    path = write(tmp_path / "x.csv", "user_id,item_id,timestamp\n1,a,3\n")
    for other, cure in (("timestamp_column", "--timestamp_column"), ("session_column", "session_column")):
        with pytest.raises(DataError, match=rf"item_id, timestamp\. Pass {cure} with the right one\.$"):
            read_interactions(path, **{other: "tm"})


def test_columns_that_occur_twice(tmp_path):
    with pytest.raises(DataError, match="column 'item_id' occurs more than once"):
        read_interactions(write(tmp_path / "x.csv", "user_id,item_id,item_id,timestamp\n1,2,3,4\n"))


def test_an_index_that_was_written_hides_no_duplicates(tmp_path):
    rows = pd.DataFrame({"user_id": 1, "item_id": ["a", "b", "a"], "timestamp": [1, 2, 1]})
    rows.to_csv(tmp_path / "x.csv")
    assert in_memory(tmp_path / "x.csv") == prepared(tmp_path / "x.csv") == [(1, "a"), (1, "b")]
    with pytest.warns(
        UserWarning, match="1 of 3 rows equal an earlier row but for event, which differs in every row; they are kept"
    ):
        assert len(read_interactions(rows.assign(event=["x", "y", "z"]))) == 3


def test_a_compressed_file_that_expands_beyond_all_measure(tmp_path, monkeypatch):
    monkeypatch.setattr("onerec_hf.data.compressed._FREE_BYTES", 1000)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"user_id,item_id,timestamp\n" + b"1,2,3\n" * 50_000))
    with pytest.raises(DataError, match="expand to more than"):
        read_interactions(tmp_path / "x.csv.gz")
    (tmp_path / "y.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"y.csv.gz: cannot be read as csv"):
        read_interactions(tmp_path / "y.csv.gz")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.csv", "user_id,item_id,timestamp\n" + ROWS)
    assert in_memory("~/x.csv") == IN_ORDER


@pytest.mark.parametrize(
    ("interacted", "listed", "expected"),
    [
        ([7, 8], ["7", "8", "9"], [7, 8]),
        (["7", "8"], [7, 8, 9], ["7", "8"]),
        (["7", "B2"], [7, 8], None),
        ([7, 8], ["7", "8", "B2"], ["7", "8"]),
        ([7, 8], ["07", "08"], None),
    ],
)
def test_ids_that_differ_in_type_only(interacted, listed, expected):
    rows = pd.DataFrame({"user_id": 1, "item_id": interacted, "timestamp": [1, 2]})
    items = pd.DataFrame({"item_id": listed, "title": "x"})
    if expected is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(DataError, match="have no row in the item table"):
                load_files(rows, items)
        return
    with pytest.warns(UserWarning, match=r"they are matched as (text|integers)"):
        data = load_files(rows, items)
    assert data.interactions["item_id"].tolist() == expected
    assert data.items.select(expected).item_ids.tolist() == expected


def test_items_without_a_row_are_dropped_on_request():
    rows = pd.DataFrame({"user_id": 1, "item_id": ["a", "b", "c", "b"], "timestamp": range(4)})
    items = pd.DataFrame({"item_id": ["a", "c"], "title": ["A", "C"]})
    with pytest.raises(DataError, match="--missing_items drop"):
        load_files(rows, items)
    with pytest.warns(
        UserWarning, match=r"dropped 2 of 4 rows, whose 1 items have no row in the item table .first: 'b'"
    ):
        assert load_files(rows, items, missing_items="drop").interactions["item_id"].tolist() == ["a", "c"]
    with pytest.raises(ValueError, match="--missing_items maybe: choose error or drop"):
        load_files(rows, items, missing_items="maybe")


def test_polars_frames():
    rows = pl.DataFrame({"user_id": [1, 1], "item_id": ["a", "b"], "timestamp": [2, 1]})
    items = pl.LazyFrame({"item_id": ["a", "b"], "title": ["A", "B"], "tags": [["x"], ["y"]]})
    assert load_files(rows, items).items.frame["text"].tolist() == ["A | x", "B | y"]


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (gzip.compress(b"user_id,item_id,timestamp\n1,a,1\n"), "compressed by gzip: let its name end in .gz"),
        ("user_id,item_id,timestamp\n1,商品,1\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("user_id,item_id,timestamp\n1,商品,1\n".encode("gbk"), "iconv -f GBK -t UTF-8 with the encoding that it has"),
        (b"PK\x03\x04\xff\xfe", "an Excel workbook"),
    ],
    ids=["gzip", "UTF-16", "GBK", "Excel"],
)
def test_what_is_no_utf8_is_named_by_its_beginning(tmp_path, content, cure):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(cure)):
        read_interactions(path)
    with pytest.raises(DataError, match=re.escape(cure)):
        prepare_log(path, tmp_path / "ready")


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_half_a_character_is_named(tmp_path, name):
    lines = [
        '{"user_id": "u", "item_id": "m\\ud83d\\ude00", "timestamp": 1}',
        '{"user_id": "u", "item_id": "m\\ud83d", "timestamp": 2}',
    ]
    path = write(tmp_path / name, "\n".join(lines) if name == "log.jsonl" else f"[{','.join(lines)}]")
    with pytest.raises(DataError, match=r"log\.jsonl?: cannot be read .*row 1: .*'item_id' holds half a character"):
        read_interactions(path)
