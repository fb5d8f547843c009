"""GRID's tensors: what is written is read back, and every refusal says why."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from onerec_hf.semantic_ids.formats.grid import read_grid_tensor, write_grid_tensor
from tests.semantic_ids.formats.drawing import catalogues, same


@settings(deadline=None, max_examples=30)
@given(catalogues(), st.sampled_from([".npy", ".safetensors"]))
def test_grid_tensor(tmp_path_factory, catalogue, suffix):
    path = tmp_path_factory.mktemp("grid") / f"ids{suffix}"
    write_grid_tensor(catalogue, path)
    imported = read_grid_tensor(path, catalogue.item_ids, codebook_sizes=catalogue.codebook_sizes)
    same(catalogue, imported.to_catalogue().catalogue)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


class TestGridTensor:
    def test_orientation_and_default_ids(self):
        """GRID indexes `tensor.t()[item]`: column i is item i, the last row its digit among items with equal codes."""
        tensor = torch.tensor([[3, 3, 0], [1, 1, 2], [0, 1, 0]], dtype=torch.int32)
        imported = read_grid_tensor(tensor)
        assert imported.item_ids == [0, 1, 2]
        assert imported.codes.tolist() == [[3, 1, 0], [3, 1, 1], [0, 2, 0]]
        assert imported.codebook_sizes == [4, 3, 2]
        assert imported.to_catalogue().catalogue.indices([2]).tolist() == [2]
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
            (torch.tensor([[1.0, 2.0]]), None, r"the tensor has dtype torch.float32, .*tensor.long\(\)"),
            (torch.tensor([[True]]), None, "dtype torch.bool, but semantic IDs are integers"),
            (np.array([[1.0]]), None, "dtype float64, but semantic IDs are integers"),
            (np.array([["x"]]), None, "semantic IDs are integers"),
            (np.array([1, 2]), None, r"expected shape \(levels, items\) with at least one of each, got \(2,\)"),
            (np.zeros((3, 0), dtype=int), None, r"got \(3, 0\)"),
            (
                np.array([[1, -1], [0, -2]]),
                ["p", "q"],
                "1 of 2 items have a code outside .*item 'q', level 1 of 2: code -1",
            ),
            (np.array([[2**31]]), None, "code 2147483648"),
            (np.array([[2**64 - 1]], dtype=np.uint64), None, "code 18446744073709551615"),
            (np.zeros((30, 3), dtype=int), None, r"has 30 levels and 3 items, .*tensor.T"),
            (np.zeros((3, 2), dtype=int), ["a", "b", "c"], r"but 3 item_ids; transpose the tensor with tensor.T"),
            (np.zeros((3, 2), dtype=int), ["a"], "but 1 item_ids; pass one id per column"),
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
            ValueError, match=r"is a pickled file, which onerec_hf does not open.*numpy.save\(.*weights_only=True"
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
        with pytest.raises(ValueError, match="expected a single tensor, or one called 'semantic_ids'; found a, b"):
            read_grid_tensor(tmp_path / "two.safetensors")
        with pytest.raises(ValueError, match=r"unsupported suffix '.pt'; use .npy or .safetensors.*torch.save"):
            write_grid_tensor(catalogue, tmp_path / "ids.pt")
        with pytest.raises(FileNotFoundError):
            read_grid_tensor(tmp_path / "none.npy")
