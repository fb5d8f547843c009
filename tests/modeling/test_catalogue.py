"""ItemCatalogue: ids kept exactly, lookups, identity by hash, and files that are mapped, or refused rather than misread."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import ItemCatalogue
from onerec_hf.baselines import ItemIndex
from onerec_hf.modeling.processing_onerec_reward import RewardItems
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
    assert catalogue.indices([item_ids[i] for i in order]).tolist() == order.tolist()


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
    assert loaded.indices(item_ids).tolist() == list(range(len(item_ids)))
    assert loaded.popularity.tolist() == list(range(len(item_ids)))
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    loaded.verify()


def test_rows_of_codes_equal_a_dictionary():
    catalogue = make_catalogue(50, (4, 5, 6))
    known = {tuple(code): row for row, code in enumerate(catalogue.codes.tolist())}
    every = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in catalogue.codebook_sizes))
    found = catalogue.indices_of_codes(every).tolist()
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
        catalogue.indices(["m1", "zzz", "m999"])
    assert catalogue.indices(["m1", "zzz"], unknown="mask").tolist() == [1, -1]
    with pytest.raises(TypeError, match="of type str; got 1"):
        catalogue.indices([1])


def test_ids_of_every_sort(catalogue):
    """Longer than any id of the catalogue, beyond ASCII, or not a list."""
    assert catalogue.indices(["m1" + "0" * 50, "é", "m3"], unknown="mask").tolist() == [-1, -1, 3]
    assert catalogue.indices(np.array(["m3", "m4"])).tolist() == [3, 4]
    assert catalogue.indices(f"m{i}" for i in range(3)).tolist() == [0, 1, 2]
    assert catalogue.indices([]).tolist() == catalogue.indices(np.zeros(0)).tolist() == []
    assert catalogue.ids([3, -1]) == ["m3", None]
    numbers = ItemCatalogue(torch.tensor([5, -3]), [[0], [1]], [2])
    assert (
        numbers.indices(torch.tensor([-3, 5])).tolist()
        == numbers.indices(np.array([-3, 5], np.int8)).tolist()
        == [1, 0]
    )
    assert [type(item) for item in numbers.item_ids] == [int, int]
    with pytest.raises(ValueError, match="must not end in a NUL"):
        ItemCatalogue(["a", "b\0"], [[0], [1]], [2])
    for beyond in ([2**63, 1], np.array([2**63, 1], dtype=np.uint64)):
        with pytest.raises(ValueError, match="fit in 64 bits with a sign; got 9223372036854775808"):
            ItemCatalogue(beyond, [[0], [1]], [2])


@pytest.mark.parametrize("kind", ["catalogue", "numbers", "index", "reward"])
def test_one_long_id_costs_no_more_than_itself(kind):
    """A lookup of a megabyte takes megabytes: ids that are longer than any known one are not what others are padded to."""
    known = list(range(40)) if kind == "numbers" else [f"m{i}" for i in range(40)]
    if kind == "index":
        look_up = ItemIndex(known).indices
    elif kind == "reward":
        look_up = RewardItems(known).indices
    else:
        look_up = ItemCatalogue(known, make_catalogue().codes, [4, 5, 6]).indices
    wanted = ["m1", "x" * 200_000, *["m2"] * 5_000]
    tracemalloc.start()
    try:
        with pytest.raises(TypeError if kind == "numbers" else KeyError, match="item"):
            look_up(wanted)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(ids.filter(lambda ids: isinstance(ids[0], str)), st.data())
def test_longer_ids_than_the_longest_are_unknown(item_ids, data):
    catalogue = ItemCatalogue(item_ids, np.arange(len(item_ids))[:, None], [len(item_ids)])
    base = data.draw(st.sampled_from(item_ids))
    longer = base + data.draw(st.sampled_from(["\0a", ".", "....", "\0....", "é" * 9, "\U0001f600", "x" * 99]))
    expected = item_ids.index(longer) if longer in item_ids else -1
    assert catalogue.indices([base, longer], unknown="mask").tolist() == [item_ids.index(base), expected]


def test_an_id_that_others_cannot_be_padded_to():
    many = [f"m{i}" for i in range(2_000)] + ["x" * 600_000]
    with pytest.raises(ValueError, match=r"item id 2000 has 600,000 bytes \('xxxx.*shorten it"):
        ItemCatalogue(many, np.arange(len(many))[:, None], [len(many)])


def test_code_spaces_beyond_64_bits():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (500, 9))
    codes[:, :6] = codes[:1, :6]  # so that prefixes are shared
    catalogue = ItemCatalogue(range(500), codes, [256] * 9)
    assert catalogue.indices_of_codes(torch.from_numpy(codes)).tolist() == list(range(500))
    assert catalogue.trie.find_leaves(torch.from_numpy(codes)).tolist() == catalogue.trie.index_to_leaf.tolist()
    free = catalogue.free_last_codes(codes[:, :-1])
    assert [bool(free[row, code]) for row, code in enumerate(codes[:, -1])] == [False] * 500
    assert (~free).sum() == sum((codes[:, :-1] == code[:-1]).all(1).sum() for code in codes)


def test_a_loaded_catalogue_is_mapped_and_read_only(catalogue, tmp_path):
    path = tmp_path / "catalogue.safetensors"
    catalogue.save(path)
    loaded = ItemCatalogue.load(path)
    for array in (loaded.codes, loaded.active, loaded._keys, loaded._id_order, loaded._code_order):
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        catalogue.codes[0] = 0


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


def test_files_that_are_no_safetensors(tmp_path):
    path = tmp_path / "catalogue.safetensors"
    for content in (
        b"",
        b"\1\0",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK\3\4" * 9,
        b"\2" + b"\0" * 7 + b"[]",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or cut short"):
            ItemCatalogue.load(path)
    path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)  # deeper than Python recurses
    with pytest.raises(ValueError, match="damaged or cut short"):
        ItemCatalogue.load(path)
    with pytest.raises(FileNotFoundError):
        ItemCatalogue.load(tmp_path / "nothing")


def _rewritten(data: bytes, change) -> bytes:
    """A safetensors file with its header changed by a function, aligned as before."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["codes"].update(shape=[2**60, 3]),
        lambda header: header["codes"].update(shape=[40, 2]),
        lambda header: header["codes"].update(shape=[-40, -3]),
        lambda header: header["codes"].update(shape=[True, 3]),
        lambda header: header["codes"].update(dtype="F32"),
        lambda header: header["codes"].update(data_offsets=[0, 480]),
        lambda header: header["codes"].update(data_offsets=[10**12, 10**12 + 480]),
        lambda header: header["id_order"].update(data_offsets=[4, 324]),
        lambda header: header["id_order"].update(shape=[39], data_offsets=[0, 312]),
        lambda header: header["item_ids"].update(shape=[120, 1]),
        lambda header: header["active"].update(shape=[40, 1]),
        lambda header: header.update(codes=7),
        lambda header: header.pop("code_order"),
        lambda header: header.update(more=header["active"]),
        lambda header: header["__metadata__"].pop("hash"),
        lambda header: header["__metadata__"].update(id_type="int"),
        lambda header: header["__metadata__"].update(codebook_sizes="4,5"),
        lambda header: header["__metadata__"].update(codebook_sizes="4,x,6"),
        lambda header: header["__metadata__"].update(codebook_sizes="9" * 5000),
        lambda header: [
            header[name].update(shape=[0, *header[name]["shape"][1:]]) for name in header if name[0] != "_"
        ],
    ],
)
def test_headers_that_describe_something_else(catalogue, tmp_path, change):
    path = tmp_path / "catalogue.safetensors"
    catalogue.save(path)
    data = path.read_bytes()
    path.write_bytes(_rewritten(data, lambda header: None))
    assert ItemCatalogue.load(path).item_ids == catalogue.item_ids
    path.write_bytes(_rewritten(data, change))
    with pytest.raises(ValueError, match="damaged or cut short"):
        ItemCatalogue.load(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_harmless_to_load(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.safetensors"
    catalogue = make_catalogue()
    catalogue.save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    whole = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, (len(content) if whole else header) - 1))
        content[place] = data.draw(st.integers(0, 255))
    keep = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path.write_bytes(bytes(content[:keep]) + data.draw(st.binary(max_size=3)))
    try:
        loaded = ItemCatalogue.load(path)
    except ValueError:
        return
    try:
        loaded.verify()
    except ValueError:
        return
    assert loaded.item_ids == catalogue.item_ids
    assert (loaded.codes == catalogue.codes).all()


def test_verify_finds_what_the_header_does_not_show(catalogue, tmp_path):
    path = tmp_path / "catalogue.safetensors"
    catalogue.save(path)
    data = bytearray(path.read_bytes())
    data[-130] ^= 1  # within the ids
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"does not match its hash|item ids repeat"):
        ItemCatalogue.load(path).verify()


def test_other_popularity_is_the_same_catalogue(catalogue, tmp_path):
    counted = catalogue.with_popularity(np.arange(len(catalogue)))
    assert (counted.hash, counted.version) == (catalogue.hash, catalogue.version)
    assert catalogue.popularity is None
    counted.save(tmp_path / "catalogue.safetensors")
    loaded = ItemCatalogue.load(tmp_path / "catalogue.safetensors")
    loaded.verify()
    assert loaded.popularity.tolist() == list(range(len(catalogue)))
    assert loaded.with_popularity(None).popularity is None
    with pytest.raises(ValueError, match=r"popularity: expected shape \(40,\), got \(2,\)"):
        loaded.with_popularity([1, 2])
    with pytest.raises(ValueError, match="read-only"):
        counted.popularity[0] = 7
