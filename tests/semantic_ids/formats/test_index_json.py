"""Semantic IDs as tokens: what is written is read back, and every refusal says why."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.semantic_ids.formats.index_json import read_index_json, read_semantic_id_strings, write_index_json
from tests.semantic_ids.formats.drawing import catalogues, same


def index_file(tmp_path, content):
    path = tmp_path / "my.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@settings(deadline=None, max_examples=60)
@given(catalogues())
def test_index_json(tmp_path_factory, catalogue):
    path = tmp_path_factory.mktemp("json") / "x.index.json"
    write_index_json(catalogue, path)
    imported = read_index_json(path, integer_ids=catalogue.id_type == "int")
    same(catalogue, imported.to_catalogue(codebook_sizes=catalogue.codebook_sizes).catalogue)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@settings(deadline=None, max_examples=30)
@given(catalogues(), st.sampled_from(["", " ", ", "]))
def test_strings(catalogue, separator):
    lists = [
        [f"<{letter}_{code}>" for letter, code in zip("abcd", row, strict=False)] for row in catalogue.codes.tolist()
    ]
    for values in (
        lists,
        [separator.join(tokens) for tokens in lists],
        [np.array(t, dtype=object) for t in lists],
    ):
        np.testing.assert_array_equal(read_semantic_id_strings(catalogue.item_ids, values).codes, catalogue.codes)


def test_a_failed_write_leaves_the_old_file(tmp_path, catalogue):
    path = tmp_path / "x.index.json"
    write_index_json(catalogue, path)
    before = path.read_bytes()
    wide = ItemCatalogue(["a"], [[0] * 27], [1] * 27)
    with pytest.raises(ValueError, match=r"at most 26 levels .*; the catalogue has 27 levels"):
        write_index_json(wide, path)
    assert path.read_bytes() == before


class TestIndexJson:
    def test_letters_form(self, tmp_path):
        path = index_file(
            tmp_path, '{"0": ["<a_183>", "<b_70>", "<c_232>", "<d_6>"], "1": ["<a_9>","<b_0>","<c_1>","<d_255>"]}'
        )
        imported = read_index_json(path, codebook_sizes=[256] * 4)
        assert imported.item_ids == [0, 1]
        assert imported.codes.tolist() == [[183, 70, 232, 6], [9, 0, 1, 255]]
        assert imported.codes.dtype == np.int64
        assert imported.codebook_sizes == [256] * 4
        assert read_index_json(path).codebook_sizes == [184, 71, 233, 256]
        assert len(imported) == 2
        assert str(path) in repr(imported)

    @pytest.mark.parametrize(
        ("keys", "integer_ids", "expected"),
        [
            (["12", "-4", "0"], None, [12, -4, 0]),
            (["12", "4"], False, ["12", "4"]),
            (["012", "4"], None, ["012", "4"]),
            (["9" * 19, "1"], None, ["9" * 19, "1"]),
            (["a", "1"], None, ["a", "1"]),
            (["é", ""], None, ["é", ""]),
        ],
    )
    def test_ids(self, tmp_path, keys, integer_ids, expected):
        path = index_file(tmp_path, {key: [f"<a_{n}>"] for n, key in enumerate(keys)})
        assert read_index_json(path, integer_ids=integer_ids).item_ids == expected

    def test_an_extra_level_for_colliding_items_only(self, tmp_path):
        """MiniOneRec's RQ-KMeans: items that collide get a fourth token, counting from 1; the others have three."""
        content = {"0": ["<a_1>", "<b_2>", "<d_1>"], "1": ["<a_1>", "<b_2>"]}
        rows = {"0": "<a_1><b_2><c_1>", "1": "<a_0><b_2>", "2": "<a_1><b_2><c_2>"}
        path = index_file(tmp_path, rows)
        imported = read_index_json(path, pad_levels=True)
        assert imported.codes.tolist() == [[1, 2, 1], [0, 2, 0], [1, 2, 2]]
        assert imported.collisions == 0
        with pytest.raises(ValueError, match=r"1 of 3 items do not have 3 levels .*item 1 has 2.*pad_levels=True"):
            read_index_json(path)
        with pytest.raises(ValueError, match="out of order"):
            read_index_json(index_file(tmp_path, content), pad_levels=True)
        with pytest.raises(
            ValueError, match=r"items do not have 3 levels \(first: item 'x' has 1\); every item needs"
        ):
            read_index_json(index_file(tmp_path, {**rows, "x": "<a_1>"}), pad_levels=True)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "is empty; copy or download it again"),
            (" \n", "is empty"),
            ("{", "is not valid JSON"),
            ("\x00\x01", "is not valid JSON"),
            ("[" * 100_000, "is not valid JSON"),
            ("{}", "contains an empty object; expected an object of items"),
            ('[["<a_1>"]]', "contains JSON of type list; expected an object of items"),
            ("3", "contains JSON of type int"),
            ('{"x": 3}', r"1 of 1 items have a malformed semantic ID \(first: item 'x', 3\); expected tokens"),
            ('{"x": {"a": 1}}', r"malformed semantic ID \(first: item 'x', {'a': 1}\)"),
            ('{"x": [], "y": ["<a_1>"]}', r"1 of 2 items have a malformed .*item 'x', \[\]"),
            ('{"x": ["<a_1>"], "y": ["<a_1"]}', "1 of 2 items have a malformed .*item 'y'"),
            ('{"x": ["<a_-1>"]}', "malformed"),
            ('{"x": ["<a_01>"]}', "malformed"),
            ('{"x": ["<A_1>"]}', "malformed"),
            ('{"x": ["<a_1>", 2]}', "malformed"),
            ('{"x": ["<a_1><b_2>"]}', "malformed"),
            ('{"x": "a_1"}', "malformed"),
            (
                '{"x": ["<b_1>", "<a_2>"]}',
                r"1 of 1 items have levels out of order .*item 'x' has the levels b, a\); expected a, b",
            ),
            ('{"x": ["<a_1>", "<a_2>"]}', "out of order"),
            ('{"x": ["<a_1>", "<c_2>"]}', "out of order"),
            (
                '{"x": ["<a_1>", "<b_2>"], "y": ["<a_1>", "<b_2>", "<c_3>", "<d_1>"], "z": ["<a_0>", "<b_2>"]}',
                r"1 of 3 items do not have 2 levels \(first: item 'y' has 4\); every item needs a code per level",
            ),
            ('{"x": ["<a_1>"], "y": ["<a_2>"], "x": ["<a_3>"]}', r"1 of 2 items occur more than once \(first: 'x'\)"),
            ('{"x": ["<a_9999999999>"]}', "code outside its codebook .*code 9999999999"),
        ],
    )
    def test_refuses(self, tmp_path, content, words):
        path = index_file(tmp_path, content)
        with pytest.raises(ValueError, match=words) as caught:
            read_index_json(path)
        assert str(path) in str(caught.value)

    def test_refuses_what_is_no_text(self, tmp_path):
        path = tmp_path / "x.index.json"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is not valid JSON"):
            read_index_json(path)
        with pytest.raises(FileNotFoundError, match="none"):
            read_index_json(tmp_path / "none.index.json")

    def test_refuses_codes_beyond_given_sizes_and_ids_that_are_no_integers(self, tmp_path):
        path = index_file(tmp_path, {"x": ["<a_1>", "<b_300>"], "7": ["<a_0>", "<b_255>"]})
        with pytest.raises(
            ValueError,
            match=r"1 of 2 items have a code outside .*item 'x', level 2 of 2: code 300; codes run from 0 to 255",
        ):
            read_index_json(path, codebook_sizes=[256, 256])
        with pytest.raises(ValueError, match=r"2 levels, but codebook_sizes has 3: \[256, 256, 256\]"):
            read_index_json(path, codebook_sizes=[256] * 3)
        with pytest.raises(ValueError, match=r"integer_ids=True, but 1 of 2 item ids are not integers \(first: 'x'\)"):
            read_index_json(path, integer_ids=True)


class TestStrings:
    @pytest.mark.parametrize(
        ("ids", "values", "words"),
        [
            ([1, 2], ["<a_1>"], "1 semantic IDs, but 2 item_ids"),
            ([], [], "no items given"),
            ([1, 2], ["<a_1>", None], r"1 of 2 items have a malformed semantic ID \(first: item 2, None\)"),
            (np.array([1, 2]), ["<a_1>", float("nan")], "first: item 2, nan"),
            (["p", "q"], ["<a_1>", "<a_1>x" * 99], r"item 'q', '<a_1>x.{70,80}\.\.\.\)"),
            ([1], ["<a_1>-<b_2>"], "malformed"),
            ([1], [""], "malformed"),
            ([1], [["<a_1>", None]], "malformed"),
        ],
    )
    def test_refuses(self, ids, values, words):
        with pytest.raises(ValueError, match=words):
            read_semantic_id_strings(ids, values)

    def test_letter_on_amazon_beauty(self, data_folder):
        """LETTER's own IDs: 12,088 distinct of 12,101; each policy makes a catalogue of all items."""
        items = pd.read_parquet(data_folder / "amazon_beauty" / "items.parquet", columns=["item_id", "letter_sid"])
        imported = read_semantic_id_strings(items["item_id"].to_numpy(), items["letter_sid"], codebook_sizes=[256] * 4)
        assert len(imported) == 12_101
        assert imported.collisions == 13
        assert sum(len(group) - 1 for group in imported.groups()) == 13
        with pytest.raises(ValueError, match="share a semantic ID"):
            imported.to_catalogue()
        assigned, moved = imported.to_catalogue("assign")
        assert len(assigned) == 12_101
        assert assigned.codebook_sizes == [256] * 4
        assert moved.sum() == (assigned.codes != imported.codes).any(1).sum() == 13
        np.testing.assert_array_equal(assigned.codes[:, :3], imported.codes[:, :3])
        extra, moved = imported.to_catalogue("extra-digit")
        np.testing.assert_array_equal(extra.codes[:, :4], imported.codes)
        largest = max(map(len, imported.groups()))
        assert extra.codebook_sizes == [256, 256, 256, 256, largest]
        assert moved.sum() == 13
