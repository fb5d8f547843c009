"""Semantic IDs from and to other tools: what comes in goes out, collisions are counted and resolved, and every refusal says why."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from onerec_hf.modeling.catalogue import ItemCatalogue
from onerec_hf.semantic_ids.formats.grid import read_grid_tensor, write_grid_tensor
from onerec_hf.semantic_ids.formats.imported import ImportedIDs
from onerec_hf.semantic_ids.formats.index_json import read_index_json, read_semantic_id_strings, write_index_json

COLLIDING = ImportedIDs(["a", "b", "c", "d", "e"], [[0, 2], [1, 1], [0, 2], [0, 0], [0, 2]])


def index_file(tmp_path, content):
    path = tmp_path / "my.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def same(first: ItemCatalogue, second: ItemCatalogue):
    assert second.item_ids == first.item_ids
    np.testing.assert_array_equal(second.codes, first.codes)
    assert second.hash == first.hash


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    flat = draw(st.lists(st.integers(0, int(np.prod(sizes)) - 1), min_size=1, max_size=12, unique=True))
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    ids = st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(flat), max_size=len(flat), unique=True),
        st.lists(texts, min_size=len(flat), max_size=len(flat), unique=True),
    )
    return ItemCatalogue(draw(ids), np.stack(np.unravel_index(flat, sizes), axis=1), sizes)


@st.composite
def imports(draw):
    levels = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 3), min_size=levels, max_size=levels)
    codes = np.array(draw(st.lists(row, min_size=1, max_size=14)))
    return ImportedIDs([f"i{n}" for n in range(len(codes))], codes)


class TestRoundTrips:
    @settings(deadline=None, max_examples=60)
    @given(catalogues())
    def test_index_json(self, tmp_path_factory, catalogue):
        path = tmp_path_factory.mktemp("json") / "x.index.json"
        write_index_json(catalogue, path)
        imported = read_index_json(path, integer_ids=catalogue.id_type == "int")
        same(catalogue, imported.to_catalogue(codebook_sizes=catalogue.codebook_sizes).catalogue)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    @settings(deadline=None, max_examples=30)
    @given(catalogues(), st.sampled_from([".npy", ".safetensors"]))
    def test_grid_tensor(self, tmp_path_factory, catalogue, suffix):
        path = tmp_path_factory.mktemp("grid") / f"ids{suffix}"
        write_grid_tensor(catalogue, path)
        imported = read_grid_tensor(path, catalogue.item_ids, codebook_sizes=catalogue.codebook_sizes)
        same(catalogue, imported.to_catalogue().catalogue)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    @settings(deadline=None, max_examples=30)
    @given(catalogues(), st.sampled_from(["", " ", ", "]))
    def test_strings(self, catalogue, separator):
        lists = [
            [f"<{letter}_{code}>" for letter, code in zip("abcd", row, strict=False)]
            for row in catalogue.codes.tolist()
        ]
        for values in (
            lists,
            [separator.join(tokens) for tokens in lists],
            [np.array(t, dtype=object) for t in lists],
        ):
            np.testing.assert_array_equal(read_semantic_id_strings(catalogue.item_ids, values).codes, catalogue.codes)

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, catalogue):
        path = tmp_path / "x.index.json"
        write_index_json(catalogue, path)
        before = path.read_bytes()
        wide = ItemCatalogue(["a"], [[0] * 27], [1] * 27)
        with pytest.raises(ValueError, match="at most 26; the catalogue has 27 levels"):
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
        with pytest.raises(
            ValueError, match=r"1 of 3 items have another number of levels than 3 .*item 1 has 2.*pad_levels=True"
        ):
            read_index_json(path)
        with pytest.raises(ValueError, match="out of order"):
            read_index_json(index_file(tmp_path, content), pad_levels=True)
        with pytest.raises(
            ValueError, match=r"another number of levels than 3 \(first: item 'x' has 1\); each level needs"
        ):
            read_index_json(index_file(tmp_path, {**rows, "x": "<a_1>"}), pad_levels=True)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "is empty; copy or download it again"),
            (" \n", "is empty"),
            ("{", "is no JSON"),
            ("\x00\x01", "is no JSON"),
            ("[" * 100_000, "is no JSON"),
            ("{}", "holds an empty object; expected an object of items"),
            ('[["<a_1>"]]', "holds JSON of type list; expected an object of items"),
            ("3", "holds JSON of type int"),
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
                r"1 of 3 items have another number of levels than 2 \(first: item 'y' has 4\); each level needs a code",
            ),
            ('{"x": ["<a_1>"], "y": ["<a_2>"], "x": ["<a_3>"]}', r"1 of 2 items stand more than once \(first: 'x'\)"),
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
        with pytest.raises(ValueError, match="is no JSON"):
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
        with pytest.raises(
            ValueError, match=r"integer_ids was asked for, but 1 of 2 items are no integers \(first: 'x'\)"
        ):
            read_index_json(path, integer_ids=True)


class TestStrings:
    @pytest.mark.parametrize(
        ("ids", "values", "words"),
        [
            ([1, 2], ["<a_1>"], "1 semantic IDs, but 2 item_ids"),
            ([], [], "there are no items"),
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


class TestGridTensor:
    def test_orientation_and_default_ids(self):
        """GRID indexes `tensor.t()[item]`: column i is item i, the last row its digit among items with equal codes."""
        tensor = torch.tensor([[3, 3, 0], [1, 1, 2], [0, 1, 0]], dtype=torch.int32)
        imported = read_grid_tensor(tensor)
        assert imported.item_ids == [0, 1, 2]
        assert imported.codes.tolist() == [[3, 1, 0], [3, 1, 1], [0, 2, 0]]
        assert imported.codebook_sizes == [4, 3, 2]
        assert imported.to_catalogue().catalogue.rows([2]).tolist() == [2]
        for dtype in (np.uint8, np.int16, np.uint64):
            assert (
                read_grid_tensor(tensor.numpy().astype(dtype), list("xyz")).codes.tolist() == imported.codes.tolist()
            )

    def test_a_single_tensor_of_another_name(self, tmp_path):
        save_file({"map": np.array([[1, 0]])}, tmp_path / "x.safetensors")
        assert read_grid_tensor(tmp_path / "x.safetensors").codes.tolist() == [[1], [0]]

    @pytest.mark.parametrize(
        ("tensor", "ids", "words"),
        [
            (torch.tensor([[1.0, 2.0]]), None, r"the tensor holds torch.float32, not integers; .*tensor.long\(\)"),
            (torch.tensor([[True]]), None, "torch.bool, not integers"),
            (np.array([[1.0]]), None, "float64, not integers"),
            (np.array([["x"]]), None, "not integers"),
            (np.array([1, 2]), None, r"expected shape \(levels, items\) and at least one of each, got \(2,\)"),
            (np.zeros((3, 0), dtype=int), None, r"got \(3, 0\)"),
            (
                np.array([[1, -1], [0, -2]]),
                ["p", "q"],
                "1 of 2 items have a code outside .*item 'q', level 1 of 2: code -1",
            ),
            (np.array([[2**31]]), None, "code 2147483648"),
            (np.array([[2**64 - 1]], dtype=np.uint64), None, "code 18446744073709551615"),
            (np.zeros((30, 3), dtype=int), None, r"would be 30 levels of 3 items; .*tensor.T"),
            (np.zeros((3, 2), dtype=int), ["a", "b", "c"], r"but 3 item_ids; it looks transposed: pass tensor.T"),
            (np.zeros((3, 2), dtype=int), ["a"], "but 1 item_ids; give one id per column"),
        ],
    )
    def test_refuses(self, tensor, ids, words):
        with pytest.raises(ValueError, match=words):
            read_grid_tensor(tensor, ids)

    def test_refuses_codes_beyond_given_sizes(self):
        with pytest.raises(ValueError, match="level 1 of 2: code 4; codes run from 0 to 3"):
            read_grid_tensor(np.array([[3, 4], [0, 0]]), codebook_sizes=[4, 4])

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".PT"])
    def test_never_unpickles(self, tmp_path, suffix):
        path = tmp_path / f"merged_predictions_tensor{suffix}"
        torch.save(torch.tensor([[1]]), path)
        with pytest.raises(
            ValueError, match=r"is a pickled file, and onerec_hf opens none.*numpy.save\(.*weights_only=True"
        ):
            read_grid_tensor(path)
        disguised = path.rename(tmp_path / "ids.npy")
        with pytest.raises(ValueError, match=r"cannot be read as .npy"):
            read_grid_tensor(disguised)
        np.save(tmp_path / "ids.npy", np.array([[{}]], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"cannot be read as .npy"):
            read_grid_tensor(disguised)

    def test_refuses_files(self, tmp_path, catalogue):
        write_grid_tensor(catalogue, tmp_path / "good.npy")
        whole = (tmp_path / "good.npy").read_bytes()
        for name, content, words in [
            ("cut.npy", whole[:-1], "cannot be read as .npy"),
            ("empty.npy", b"", "cannot be read as .npy"),
            ("header.npy", whole.replace(b"'descr'", b"('descr'"), "cannot be read as .npy"),
            ("empty.safetensors", b"", "is damaged or cut short"),
            ("x.csv", b"1,2", "unsupported suffix '.csv'; pass .npy"),
        ]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=words) as caught:
                read_grid_tensor(tmp_path / name)
            assert name in str(caught.value)
        save_file({"a": np.zeros((1, 1), int), "b": np.zeros((1, 1), int)}, tmp_path / "two.safetensors")
        with pytest.raises(ValueError, match="expected one tensor, or one called 'semantic_ids'; it holds a, b"):
            read_grid_tensor(tmp_path / "two.safetensors")
        with pytest.raises(ValueError, match=r"unsupported suffix '.pt'; write .npy or .safetensors.*torch.save"):
            write_grid_tensor(catalogue, tmp_path / "ids.pt")
        with pytest.raises(FileNotFoundError):
            read_grid_tensor(tmp_path / "none.npy")


class TestCollisions:
    def test_counts_and_groups(self):
        assert COLLIDING.collisions == 2
        assert COLLIDING.groups() == [["a", "c", "e"]]
        two = ImportedIDs([9, 8, 7, 6], [[1], [0], [0], [1]])
        assert two.groups() == [[9, 6], [8, 7]]
        assert two.groups(limit=1) == [[9, 6]]

    def test_error_is_the_catalogues(self):
        with pytest.raises(ValueError, match=r"2 items share a semantic ID with another, e.g. 'a' and 'c'"):
            COLLIDING.to_catalogue()

    def test_assign_by_hand(self):
        catalogue, moved = COLLIDING.to_catalogue("assign", codebook_sizes=[2, 5], popularity=np.arange(5))
        assert catalogue.codes.tolist() == [[0, 2], [1, 1], [0, 1], [0, 0], [0, 3]]
        assert moved.tolist() == [False, False, True, False, True]
        assert catalogue.popularity.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(
            ValueError,
            match=r"4 items share the prefix \(0,\) \(first: 'a'\), but the last level has only 3 codes.*extra-digit",
        ):
            COLLIDING.to_catalogue("assign")

    def test_extra_digit_by_hand(self):
        catalogue, moved = COLLIDING.to_catalogue("extra-digit")
        assert catalogue.codes.tolist() == [[0, 2, 0], [1, 1, 0], [0, 2, 1], [0, 0, 0], [0, 2, 2]]
        assert catalogue.codebook_sizes == [2, 3, 3]
        assert moved.tolist() == [False, False, True, False, True]
        assert COLLIDING.to_catalogue("extra-digit", [4, 4]).catalogue.codebook_sizes == [4, 4, 3]
        assert COLLIDING.to_catalogue("extra-digit", [4, 4, 4]).catalogue.codebook_sizes == [4, 4, 4]

    @settings(deadline=None, max_examples=60)
    @given(imports())
    def test_policies(self, imported):
        rows = list(map(tuple, imported.codes.tolist()))
        count = Counter(rows)
        assert imported.collisions == len(rows) - len(count)
        assert sum(map(len, imported.groups())) == sum(n for n in count.values() if n > 1)
        later = np.array([rows[i] in rows[:i] for i in range(len(rows))])

        extra, moved = imported.to_catalogue("extra-digit")
        assert extra.codes[:, -1].tolist() == [rows[:i].count(rows[i]) for i in range(len(rows))]
        assert extra.codebook_sizes[-1] == max(count.values())
        np.testing.assert_array_equal(moved, later)

        bucket = max(Counter(row[:-1] for row in rows).values())
        assigned, moved = imported.to_catalogue("assign", [*imported.codebook_sizes[:-1], max(bucket, 4)])
        np.testing.assert_array_equal(moved, later)
        np.testing.assert_array_equal(assigned.codes[~moved], imported.codes[~moved])
        np.testing.assert_array_equal(assigned.codes[:, :-1], imported.codes[:, :-1])
        assert len(np.unique(assigned.codes, axis=0)) == len(rows)
        for i in np.flatnonzero(moved):  # no lower code was free when its turn came
            taken = {row[-1] for row in rows if row[:-1] == rows[i][:-1]}
            taken |= {assigned.codes[j, -1] for j in range(i) if moved[j] and rows[j][:-1] == rows[i][:-1]}
            assert set(range(assigned.codes[i, -1])) <= taken

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: COLLIDING.to_catalogue("drop"), "on_collision must be .* got 'drop'"),
            (lambda: COLLIDING.to_catalogue(codebook_sizes=[4]), r"2 levels, but codebook_sizes has 1: \[4\]"),
            (lambda: COLLIDING.to_catalogue("extra-digit", [4]), "3 levels, but codebook_sizes has 1"),
            (lambda: COLLIDING.to_catalogue("extra-digit", [4, 4, 2]), "level 2"),
            (lambda: ImportedIDs(["a", "a"], [[0], [1]]).to_catalogue(), "1 item ids repeat"),
            (lambda: ImportedIDs(["a"], [[0], [1]]), "codes of 2 items, but 1 item_ids"),
            (lambda: ImportedIDs(["a"], [0]), r"got shape \(1,\)"),
            (lambda: ImportedIDs([], np.zeros((0, 2), int)), r"got shape \(0, 2\)"),
            (lambda: ImportedIDs(["a"], [[0.5]]), "must be integers, not float64"),
        ],
    )
    def test_refuses(self, call, words):
        with pytest.raises(ValueError, match=words):
            call()
