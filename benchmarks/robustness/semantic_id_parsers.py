"""Parsers of semantic IDs: catalogues, codebooks, reports, and the formats of other projects."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.robustness import formats
from benchmarks.robustness.fuzzing import Parser


def npy_bytes(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=version)
    return out.getvalue()


def _codes() -> np.ndarray:
    return np.array([[0, 1, 2], [1, 0, 0], [1, 1, 3], [0, 1, 0]])


def make_catalogue(ids: Any = ("m1", "m2", "m3", "m4"), **more: Any):
    from onerec_hf import ItemCatalogue

    return ItemCatalogue(list(ids), _codes(), [2, 2, 4], **more)


def _saved(save: Callable[[Path], object], name: str = "file") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, name))
        return Path(folder, name).read_bytes()


def _catalogues() -> list[bytes]:
    grown = make_catalogue().add(["m5"], [[1, 1, 1]]).retire(["m2"])
    made = [make_catalogue(), make_catalogue([7, 8, 9, -1], popularity=[3, 2, 1, 0]), grown]
    return [_saved(catalogue.save) for catalogue in made]


def _read_catalogue(path: Path) -> None:
    import torch

    from onerec_hf import ItemCatalogue

    catalogue = ItemCatalogue.load(path)
    try:
        catalogue.verify()
    except ValueError as error:  # it knows no file any more; whoever calls it does
        raise ValueError(f"{path}: {error}") from error
    ids = catalogue.item_ids
    assert catalogue.indices(ids).tolist() == list(range(len(ids)))
    catalogue.indices_of_codes(torch.from_numpy(np.array(catalogue.codes)).long())
    _ = catalogue.lineage, catalogue.num_active
    if sum(catalogue.codebook_sizes) < 10_000:
        _ = catalogue.trie


def _quantizers() -> list[bytes]:
    from onerec_hf.semantic_ids import ResidualQuantizer, RQVAEQuantizer

    points = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    vae = RQVAEQuantizer([3, 3], hidden_sizes=[4], latent_size=2, epochs=2, warmup_epochs=1).fit(points)
    return [_saved(ResidualQuantizer([4, 3]).fit(points).save), _saved(vae.save)]


def _read_quantizer(path: Path) -> None:
    from onerec_hf.semantic_ids.quantizer import Quantizer

    quantizer = Quantizer.load(path)
    assert quantizer.codebook_sizes


def _indexes() -> list[bytes]:
    index = {"0": ["<a_1>", "<b_0>", "<c_3>"], "1": ["<a_1>", "<b_0>", "<c_3>"], "2": ["<a_0>", "<b_2>", "<c_3>"]}
    return [json.dumps(index).encode(), json.dumps({"x": ["<a_0>"], "y": ["<a_1>", "<b_1>"]}).encode()]


def _read_index(path: Path, **arguments: Any) -> None:
    from onerec_hf.semantic_ids import read_index_json

    imported = read_index_json(path, **arguments)
    _ = imported.collisions, imported.groups(3)
    for way in ("assign", "extra-digit"):
        try:
            imported.to_catalogue(way)
        except ValueError as error:  # the catalogue's own, of ids and codes: it knows no file
            raise ValueError(f"{path}: {error}") from error


def _read_grid(path: Path) -> None:
    from onerec_hf.semantic_ids.formats.grid import read_grid_tensor

    imported = read_grid_tensor(path)
    _ = imported.collisions, imported.to_catalogue("extra-digit")


def _grid_files(suffix: str) -> list[bytes]:
    from safetensors.numpy import save

    if suffix == ".npy":
        arrays = [_codes().T, _codes().T.astype(np.int32), np.asfortranarray(_codes().T), _codes().T.astype(np.uint8)]
        return [*map(npy_bytes, arrays), npy_bytes(_codes().T, (2, 0))]
    return [
        save({"semantic_ids": np.ascontiguousarray(_codes().T)}),
        save({"other": _codes(), "semantic_ids": _codes()}),
    ]


@cache
def _report_file() -> bytes:
    from onerec_hf.semantic_ids import fit_semantic_ids

    vectors = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    return json.dumps(fit_semantic_ids(list(range(24)), vectors, [4, 24]).report.as_dict()).encode()


def _read_report(path: Path) -> None:
    from onerec_hf.semantic_ids.report import SemanticIDReport

    report = SemanticIDReport.load(path)
    _ = report.table(), report.resolution()


SEMANTIC_ID_PARSERS = [
    Parser("catalogue", "catalogue.safetensors", _read_catalogue, _catalogues, formats.safetensors_file),
    Parser("codebooks", "codebooks.safetensors", _read_quantizer, _quantizers, formats.safetensors_file),
    Parser("semantic-ids-report", "semantic_ids.json", _read_report, lambda: [_report_file()], formats.json_file),
    Parser("index-json", "Beauty.index.json", _read_index, _indexes, formats.json_file),
    Parser(
        "index-json-padded",
        "Beauty.index.json",
        partial(_read_index, pad_levels=True, integer_ids=True),
        _indexes,
        formats.json_file,
    ),
    Parser("grid-npy", "ids.npy", _read_grid, partial(_grid_files, ".npy"), formats.npy_file),
    Parser(
        "grid-safetensors",
        "ids.safetensors",
        _read_grid,
        partial(_grid_files, ".safetensors"),
        formats.safetensors_file,
    ),
]
