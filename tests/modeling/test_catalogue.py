"""ItemCatalogue: ids kept exactly, lookups, identity by hash, and files that are refused rather than misread."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import ItemCatalogue
from tests.conftest import make_catalogue

ids = st.one_of(
    st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=30, unique=True),
    st.lists(
        st.text(max_size=8).filter(lambda text: not text.endswith("\0")).filter(lambda text: _encodable(text)),
        min_size=1,
        max_size=30,
        unique=True,
    ),
)


def _encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(ids)
def test_ids_come_back_exactly(item_ids):
    codes = np.arange(len(item_ids))[:, None]
    catalogue = ItemCatalogue(item_ids, codes, [len(item_ids)])
    assert catalogue.item_ids == item_ids
    order = np.random.default_rng(0).permutation(len(item_ids))
    assert catalogue.rows([item_ids[i] for i in order]).tolist() == order.tolist()


@settings(max_examples=30, deadline=None)
@given(ids)
def test_file_round_trip(tmp_path_factory, item_ids):
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.safetensors"
    codes = np.arange(len(item_ids))[::-1, None]
    catalogue = ItemCatalogue(item_ids, codes, [len(item_ids)], popularity=np.arange(len(item_ids)))
    catalogue.save(path)
    loaded = ItemCatalogue.load(path)
    assert loaded.item_ids == item_ids
    assert loaded.hash == catalogue.hash
    assert loaded.rows(item_ids).tolist() == list(range(len(item_ids)))
    assert loaded.popularity.tolist() == list(range(len(item_ids)))
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_rows_of_codes_equal_a_dictionary():
    catalogue = make_catalogue(50, (4, 5, 6))
    known = {tuple(code): row for row, code in enumerate(catalogue.codes.tolist())}
    every = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in catalogue.codebook_sizes))
    found = catalogue.rows_of_codes(every).tolist()
    assert found == [known.get(tuple(code), -1) for code in every.tolist()]


def test_hash_names_ids_codes_and_sizes():
    base = ItemCatalogue([1, 2], [[0], [1]], [2])
    assert base.hash == ItemCatalogue(np.array([1, 2]), np.array([[0], [1]]), (2,)).hash
    others = [
        ItemCatalogue([2, 1], [[0], [1]], [2]),
        ItemCatalogue([1, 2], [[1], [0]], [2]),
        ItemCatalogue([1, 2], [[0], [1]], [3]),
        ItemCatalogue(["1", "2"], [[0], [1]], [2]),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((["a", "a"], [[0], [1]], [2]), ValueError, "item ids repeat, e.g. 'a'"),
        ((["a", "b"], [[1], [1]], [2]), ValueError, "share a semantic ID.*'a' and 'b'"),
        ((["a", "b"], [[0], [2]], [2]), ValueError, "level 0 run from 0 to 2; its codebook has 2"),
        ((["a", "b"], [[0], [1]], [2, 2]), ValueError, "expected shape"),
        ((["a", 1], [[0], [1]], [2]), TypeError, "all integers or all strings; got int, str"),
        (([True, 2], [[0], [1]], [2]), TypeError, "all integers or all strings"),
        (([], np.zeros((0, 1)), [2]), ValueError, "at least one item"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        ItemCatalogue(*arguments)


def test_unknown_items(catalogue):
    with pytest.raises(KeyError, match="2 of 3 item ids are not in the catalogue of 40 items"):
        catalogue.rows(["m1", "zzz", "m999"])
    assert catalogue.rows(["m1", "zzz"], unknown="mask").tolist() == [1, -1]
    with pytest.raises(TypeError, match="of type str; got 1"):
        catalogue.rows([1])


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_file(catalogue, tmp_path, keep):
    path = tmp_path / "catalogue.safetensors"
    catalogue.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="damaged or cut short"):
        ItemCatalogue.load(path)


def test_other_files_and_versions(catalogue, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "catalogue.safetensors"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="no item catalogue"):
        ItemCatalogue.load(path)
    catalogue.save(path)
    save_file(load_file(path), path, metadata={"format": "onerec-catalogue", "version": "99"})
    with pytest.raises(ValueError, match="version 99"):
        ItemCatalogue.load(path)
