"""`items.parquet`: what is saved of an items table, that it follows the catalogue, and that a wrong file is refused by name."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from onerec_hf import ItemCatalogue
from onerec_hf.data import DataError, read_items
from onerec_hf.data.item_fields import ItemFields, read_items_file, save_items_table
from onerec_hf.data.sources import with_text
from onerec_hf.modeling.items_file import saved_items

CODES = [[0, 1], [1, 0], [1, 1]]


def catalogue_of(*ids):
    return ItemCatalogue(list(ids), CODES[: len(ids)], [2, 2])


def test_rows_follow_the_catalogue(tmp_path):
    catalogue = catalogue_of("m3", "m1", "m2")
    table = pd.DataFrame({"item_id": ["m1", "m9", "m3"], "title": ["Alien", "Other", "Heat"]})
    assert save_items_table(tmp_path, table, catalogue) == ""
    written = pq.read_table(tmp_path / "items.parquet").to_pydict()
    assert written == {"item_id": ["m3", "m1", "m2"], "title": ["Heat", "Alien", None]}
    fields = read_items_file(tmp_path / "items.parquet", catalogue)
    assert dict(fields) == {"m3": {"title": "Heat"}, "m1": {"title": "Alien"}, "m2": {}}
    assert fields.get("m9") is None
    assert fields.get(7) is None


def test_values_come_back_as_python_ones(tmp_path):
    catalogue = catalogue_of(7, 8, 9)
    table = pd.DataFrame(
        {
            "item_id": [7, 8, 9],
            "title": ["Heat", "", None],
            "year": [1995.0, np.nan, 1979.0],
            "rating": [4.5, np.inf, np.nan],
            "sold": np.array([1, 2, 3], dtype=np.uint8),
            "adult": [True, False, True],
            "kind": pd.Categorical(["film", "film", None]),
            "out": pd.to_datetime(["1995-12-15", None, "1979-05-25"]),
            "mixed": ["a", 1, None],
        }
    )
    save_items_table(tmp_path, table, catalogue)
    fields = read_items_file(tmp_path / "items.parquet", catalogue)
    assert fields[7] == {
        "title": "Heat",
        "year": 1995,
        "rating": 4.5,
        "sold": 1,
        "adult": True,
        "kind": "film",
        "out": "1995-12-15 00:00:00",
        "mixed": "a",
    }
    assert fields[8] == {"sold": 2, "adult": False, "kind": "film", "mixed": "1"}
    assert [type(value) for value in fields[7].values()] == [str, int, float, int, bool, str, str, str]


def test_what_answers_cannot_show_is_left_out_and_counted(tmp_path):
    table = pd.DataFrame(
        {
            "item_id": [7, 8],
            "title": ["Heat", "Alien"],
            "vector": [[0.1, 0.2], [0.3, 0.4]],
            "array": [np.zeros(2), np.zeros(2)],
            "page": ["x" * 3000, "y" * 5000],
            "score": [1.0, 2.0],
            "empty": [None, None],
        }
    )
    note = save_items_table(tmp_path, table, catalogue_of(7, 8))
    assert note == (
        "items.parquet: 5 of 6 columns left out: vector (nested values), array (nested values), page (4,000 characters on average), "
        "score (answers use this name), empty (no values)"
    )
    assert pq.read_schema(tmp_path / "items.parquet").names == ["item_id", "title"]


def test_text_made_of_the_other_columns_is_not_saved_twice(tmp_path):
    catalogue = catalogue_of(7, 8)
    joined = with_text(
        read_items(pd.DataFrame({"item_id": [7, 8], "title": ["Heat", "A | B"], "genre": ["crime", ""]}))
    )
    assert joined.frame["text"].tolist() == ["Heat | crime", "A | B"]
    assert save_items_table(tmp_path, joined, catalogue) == ""
    assert pq.read_schema(tmp_path / "items.parquet").names == ["item_id", "title", "genre"]
    own = pd.DataFrame({"item_id": [7, 8], "title": ["Heat", "Alien"], "text": ["A heist.", "In space."]})
    save_items_table(tmp_path, own, catalogue)
    assert read_items_file(tmp_path / "items.parquet", catalogue)[7] == {"title": "Heat", "text": "A heist."}


def test_a_grown_catalogue_keeps_its_titles(tmp_path):
    before = catalogue_of("m1", "m2")
    save_items_table(tmp_path, pd.DataFrame({"item_id": ["m1", "m2"], "title": ["Alien", "Heat"]}), before)
    grown = before.add(["m3"], [[1, 1]]).retire(["m1"])
    assert dict(read_items_file(tmp_path / "items.parquet", grown)) == {
        "m1": {"title": "Alien"},
        "m2": {"title": "Heat"},
    }
    new = pd.DataFrame({"item_id": ["m3", "m2"], "title": ["Jaws", "Heat (1995)"], "year": [1975, 1995]})
    save_items_table(tmp_path, new, grown, keep=True)
    assert dict(read_items_file(tmp_path / "items.parquet", grown)) == {
        "m1": {"title": "Alien"},
        "m2": {"title": "Heat (1995)", "year": 1995},
        "m3": {"title": "Jaws", "year": 1975},
    }
    with pytest.raises(DataError, match=r"items\.parquet: written for another catalogue"):
        read_items_file(tmp_path / "items.parquet", before)
    save_items_table(tmp_path, new, grown)
    assert len(read_items_file(tmp_path / "items.parquet", grown)["m1"]) == 0


def test_a_missing_file_shows_no_titles(tmp_path):
    assert saved_items(tmp_path, catalogue_of(7, 8)) is None


@pytest.mark.parametrize("damage", ["cut", "foreign", "ids of another type", "no ids", "another catalogue"])
def test_a_wrong_file_is_refused_by_name(tmp_path, damage):
    catalogue, path = catalogue_of(7, 8), tmp_path / "items.parquet"
    table = pd.DataFrame({"item_id": [7, 8], "title": ["Heat", "Alien"]})
    if damage == "cut":
        save_items_table(tmp_path, table, catalogue)
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "foreign":
        table.assign(item_id=[70, 80]).to_parquet(path)
    elif damage == "ids of another type":
        table.assign(item_id=["7", "8"]).to_parquet(path)
    elif damage == "no ids":
        table.rename(columns={"item_id": "id"}).to_parquet(path)
    else:
        save_items_table(tmp_path, table, ItemCatalogue([7, 8], [[0, 0], [1, 1]], [2, 2]))
    with pytest.raises(DataError, match=r"items\.parquet: "):
        saved_items(tmp_path, catalogue)


def test_any_table_with_item_ids_will_do(tmp_path):
    pd.DataFrame({"item_id": [9, 7], "title": ["Jaws", "Heat"]}).to_parquet(tmp_path / "items.parquet")
    assert dict(saved_items(tmp_path, catalogue_of(7, 8)) or {}) == {7: {"title": "Heat"}}


def test_many_items_are_looked_up_without_a_dictionary_of_all(monkeypatch):
    count = 500
    catalogue = ItemCatalogue(range(count), np.stack([np.arange(count) // 25, np.arange(count) % 25], 1), [25, 25])
    items = read_items(pd.DataFrame({"item_id": range(count), "title": [f"Film {i}" for i in range(count)]}))
    fields = ItemFields(items, catalogue)
    monkeypatch.setattr("onerec_hf.data.item_fields._MOST_CACHED", 10)
    assert [fields[i]["title"] for i in range(count)] == [f"Film {i}" for i in range(count)]
    assert len(fields._cached) <= 10
