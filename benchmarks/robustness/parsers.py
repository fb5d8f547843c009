"""Every file that onerec_hf parses, as something to damage: valid seeds, the damage that its format invites, and the call that reads it."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.robustness import formats as formats
from benchmarks.robustness.fuzzing import Parser

_USERS = ["u1", "u1", "u1", "u2", "u2", "u3"]
_ITEMS = ["m1", "m2", "m3", "m2", "m1", "m3"]
_TIMES = [30, 10, 20, 5, 6, 7]
_RATINGS = [5.0, 3.5, 1.0, 4.0, 4.5, 2.0]


def _table(items: Any = _ITEMS, users: Any = _USERS) -> dict[str, list]:
    return {"user_id": list(users), "item_id": list(items), "timestamp": list(_TIMES), "rating": list(_RATINGS)}


def _products() -> dict[str, list]:
    return {"item_id": ["m1", "m2", "m3"], "title": ["Red lamp", "Blue lamp", "Vase, old"], "price": [1.5, 2.0, 3.0]}


def _text(columns: dict[str, list], separator: str, quoted: bool = False) -> bytes:
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    written = [[f'"{field}"' if quoted or separator in str(field) else str(field) for field in row] for row in rows]
    return "\n".join(separator.join(row) for row in written).encode() + b"\n"


def _lines(columns: dict[str, list]) -> bytes:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return "\n".join(map(json.dumps, rows)).encode() + b"\n"


def _parquet(columns: dict[str, list]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _atomic(columns: dict[str, list], kinds: list[str]) -> bytes:
    return _text({f"{name}:{kind}": values for (name, values), kind in zip(columns.items(), kinds, strict=True)}, "\t")


def _number_table() -> dict[str, list]:
    return _table([int(item[1:]) for item in _ITEMS], [int(user[1:]) for user in _USERS])


def _read_interactions(path: Path) -> None:
    from onerec_hf.data import PositiveFeedback, UserSequences, read_interactions

    table = read_interactions(path)
    assert len(table)
    assert table["timestamp"].dtype == np.int64
    UserSequences.from_interactions(PositiveFeedback().apply(table)).item_counts()


def _read_items(path: Path, **arguments: Any) -> None:
    """What `load_files` does with the file of items beside one of interactions, without reading that again each time."""
    from onerec_hf.data.columns import about
    from onerec_hf.data.interactions import read_items
    from onerec_hf.data.sources import with_text

    items = read_items(path, **arguments)
    with about(path):
        items.select(["m1", "m2", "m3"])
        with_text(items).frame["text"].map(len)


def _read_saved_items(path: Path) -> None:
    from onerec_hf.data.item_fields import read_items_file

    for item, fields in read_items_file(path, _catalogue()).items():
        json.dumps([item, fields], allow_nan=False)


def _saved_items() -> list[bytes]:
    import pandas as pd

    from onerec_hf.data.item_fields import save_items_table

    with tempfile.TemporaryDirectory() as folder:
        save_items_table(folder, pd.DataFrame(_products()), _catalogue())
        return [Path(folder, "items.parquet").read_bytes(), _parquet(_products())]


def _read_impressions(path: Path) -> None:
    from onerec_hf.data.feedback.impressions import load_impressions

    load_impressions(path, {"ltr": "like"}, 8, 15, 25, min_items=1, max_items=2)


def _impressions() -> dict[str, list]:
    return {**_table(), "like": [0, 1, 0.5, 1, 0, 0], "timestamp": [30, 10, 20, 5, 16, 27]}


def _npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=version)
    return out.getvalue()


def _matrix(rows: int, columns: int) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) / 7


def _read_embeddings(path: Path) -> None:
    from onerec_hf.data.interactions import check_embeddings

    matrix = check_embeddings(path, np.arange(6))
    assert matrix.shape[0] == 6
    assert matrix.shape[1] > 0
    float(matrix.sum())


def _codes() -> np.ndarray:
    return np.array([[0, 1, 2], [1, 0, 0], [1, 1, 3], [0, 1, 0]])


def _catalogue(ids: Any = ("m1", "m2", "m3", "m4"), **more: Any):
    from onerec_hf import ItemCatalogue

    return ItemCatalogue(list(ids), _codes(), [2, 2, 4], **more)


def _saved(save: Callable[[Path], object], name: str = "file") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, name))
        return Path(folder, name).read_bytes()


def _catalogues() -> list[bytes]:
    grown = _catalogue().add(["m5"], [[1, 1, 1]]).retire(["m2"])
    made = [_catalogue(), _catalogue([7, 8, 9, -1], popularity=[3, 2, 1, 0]), grown]
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
    assert catalogue.rows(ids).tolist() == list(range(len(ids)))
    catalogue.rows_of_codes(torch.from_numpy(np.array(catalogue.codes)).long())
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
        return [*map(_npy, arrays), _npy(_codes().T, (2, 0))]
    return [
        save({"semantic_ids": np.ascontiguousarray(_codes().T)}),
        save({"other": _codes(), "semantic_ids": _codes()}),
    ]


@cache
def _model_folder() -> Path:
    """A whole artefact: generator, processor, catalogue. Made once; it is removed with the process that made it."""
    from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor

    folder = Path(_keep().name, "model")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 4,
        "num_experts": 2,
        "num_attention_heads": 2,
    }
    config = OneRecConfig(codebook_sizes=[2, 2, 4], encoder_layers=1, decoder_layers=1, **sizes)  # pyright: ignore[reportArgumentType]
    model = OneRecForConditionalGeneration(config)
    model.set_catalogue(_catalogue())
    model.save_pretrained(folder, include_code=False)
    OneRecProcessor.from_catalogue(_catalogue(), max_history=5).save_pretrained(folder, include_code=False)
    return folder


@cache
def _reward_folder() -> Path:
    from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems

    folder = Path(_keep().name, "reward")
    config = OneRecRewardConfig(
        num_items=3, objectives=["vtr", "ltr"], hidden_size=8, intermediate_size=8, num_attention_heads=2, tower_size=4
    )
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems(["m1", "m2", "m3"]))
    model.save_pretrained(folder, include_code=False)
    return folder


@cache
def _keep() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz-models-")


def _copy(source: Callable[[], Path], folder: Path) -> None:
    shutil.copytree(source(), folder, dirs_exist_ok=True)


def _file(source: Callable[[], Path], name: str) -> list[bytes]:
    return [(source() / name).read_bytes()]


def _read_config(path: Path) -> None:
    from onerec_hf import OneRecConfig

    OneRecConfig.from_pretrained(path.parent)


def _read_reward_config(path: Path) -> None:
    from onerec_hf import OneRecRewardConfig

    OneRecRewardConfig.from_pretrained(path.parent)


def _read_processor(path: Path) -> None:
    from onerec_hf.workflows.artefact import load_processor

    processor = load_processor("--model", str(path.parent))
    processor([["m1", "m2"]])


def _read_model(path: Path) -> None:
    from onerec_hf.workflows.artefact import load_model

    load_model("--model", str(path.parent))


def _read_generation_config(path: Path) -> None:
    """The step of `from_pretrained` that reads this file, into a model that is loaded once: all the others stay as they are."""
    from onerec_hf.workflows.artefact import naming

    folder, model = str(path.parent), _model()
    with naming("--model", folder):
        # No configuration in its place, from an Auto class, no pipeline; then the download options that from_pretrained has.
        model.adjust_generation_fn(None, True, False, folder, None, False, None, False, None, "main", "", None)


@cache
def _model() -> Any:
    from onerec_hf.workflows.artefact import load_model

    return load_model("--model", str(_model_folder()))


def _read_reward(path: Path) -> None:
    from onerec_hf.workflows.artefact import load_reward

    load_reward(str(path.parent))


def _read_reward_items(path: Path) -> None:
    from onerec_hf import RewardItems

    items = RewardItems.load(path)
    assert items.rows(items.item_ids).tolist() == list(range(len(items)))


def _sharded(folder: Path) -> None:
    _copy(_model_folder, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def _weights_index() -> list[bytes]:
    from safetensors import safe_open

    with safe_open(_model_folder() / "model.safetensors", "np") as file:
        names = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    return [json.dumps({"metadata": {"total_size": 1}, "weight_map": names}).encode()]


def _read_weights_index(path: Path) -> None:
    from onerec_hf.modeling.hub import check_weights

    check_weights(str(path.parent))


def _only_an_adapter(folder: Path) -> None:
    _copy(_model_folder, folder)
    (folder / "model.safetensors").unlink()


def _adapter_config() -> list[bytes]:
    return [json.dumps({"base_model_name_or_path": str(_model_folder()), "peft_type": "LORA", "r": 4}).encode()]


def _yaml_files() -> list[bytes]:
    return [
        b"interactions: clicks.csv\ncodebook_sizes: [8, 8, 8]\nlearning_rate: 0.001\nmax_steps: 10\n",
        b"model: shop\neval_strategy: steps\nlr_scheduler_kwargs: {min_lr: 0.1}\nencoder_is_causal: true\nsave_strategy: no\n",
    ]


def _read_yaml(path: Path) -> None:
    parser, defaults = _train_parser()
    parser._from_file = []
    for action, default in defaults:  # a mapping in a file becomes the default of its option
        action.default = default
    parser.parse_command(["--config", str(path), "--output_dir", str(path.parent / "out"), "--use_cpu", "true"])


@cache
def _train_parser() -> Any:
    """The parser of `train`, and the defaults of its options."""
    from onerec_hf.cli.parser import CommandParser
    from onerec_hf.trainers import OneRecTrainingArguments
    from onerec_hf.workflows.settings import DataSettings, ModelSettings, SemanticIDSettings
    from onerec_hf.workflows.training import TrainSettings

    kinds = (DataSettings, SemanticIDSettings, ModelSettings, TrainSettings, OneRecTrainingArguments)
    parser = CommandParser(kinds, "onerec-hf train", ["--output_dir"])
    return parser, [(action, action.default) for action in parser._actions]


def _read_plan_config(path: Path) -> None:
    from onerec_hf.cli.plan import load_config

    load_config(str(path))


def _read_plan_recipe(path: Path) -> None:
    from onerec_hf.cli.plan import recipe_options

    recipe_options(str(path))


def _preferences() -> dict[str, list]:
    return {"history": [["m1"], ["m2", "m3"]], "chosen": [["m2"], ["m1"]], "rejected": [["m3"], ["m4"]]}


@cache
def _processor():
    from onerec_hf import OneRecProcessor

    return OneRecProcessor.from_catalogue(_catalogue(), max_history=5)


def _read_preferences(path: Path) -> None:
    from onerec_hf.workflows.preferences import read_preferences

    read_preferences(str(path), _processor())


def _histories() -> list[bytes]:
    return [
        b'{"user_id": 1, "history": ["m1", "m2"]}\n["m3"]\n\n{"history": ["m4", "m1"], "note": {"a": [1]}}\n',
        b'["m1"]\n',
    ]


def _read_histories(path: Path) -> None:
    from onerec_hf.cli.recommend import RecommendArguments, naming_file, read_file, resolve_line

    args = RecommendArguments(unknown="skip")
    with naming_file(str(path)):
        for number, request in read_file(path):
            resolve_line(_recommender(), number, request, args)
            json.dumps(request, ensure_ascii=False).encode()


@cache
def _recommender():
    from onerec_hf.modeling.requests import Recommender

    return Recommender(_model(), _processor())


@cache
def _report_file() -> bytes:
    from onerec_hf.semantic_ids import fit_semantic_ids

    vectors = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    return json.dumps(fit_semantic_ids(list(range(24)), vectors, [4, 24]).report.as_dict()).encode()


def _read_report(path: Path) -> None:
    from onerec_hf.semantic_ids.report import SemanticIDReport

    report = SemanticIDReport.load(path)
    _ = report.table(), report.resolution()


_COMMA, _TAB = partial(formats.text_table, separator=b","), partial(formats.text_table, separator=b"\t")
_KINDS = ["token", "token", "float", "float"]

PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        Parser(
            "interactions-csv",
            "clicks.csv",
            _read_interactions,
            lambda: [_text(_table(), ","), _text(_number_table(), ","), _text(_table(), ",", True)],
            _COMMA,
        ),
        Parser(
            "interactions-tsv",
            "clicks.tsv",
            _read_interactions,
            lambda: [_text(_table(), "\t"), _text(_number_table(), "\t")],
            _TAB,
        ),
        Parser(
            "interactions-jsonl",
            "clicks.jsonl",
            _read_interactions,
            lambda: [_lines(_table()), _lines(_number_table())],
            formats.json_lines,
        ),
        Parser(
            "interactions-parquet",
            "clicks.parquet",
            _read_interactions,
            lambda: [_parquet(_table()), _parquet(_number_table())],
            formats.parquet_file,
        ),
        Parser(
            "interactions-inter",
            "clicks.inter",
            _read_interactions,
            lambda: [_atomic(_table(), _KINDS), _atomic(_number_table(), _KINDS)],
            _TAB,
        ),
        Parser("items-csv", "products.csv", _read_items, lambda: [_text(_products(), ",")], _COMMA),
        Parser(
            "items-jsonl",
            "products.jsonl",
            partial(_read_items, embedding_column="vector"),
            lambda: [_lines({**_products(), "vector": [[1.0, 2.0], [0.5, 1], [0, 0]]})],
            formats.json_lines,
        ),
        Parser(
            "items-parquet",
            "products.parquet",
            _read_items,
            lambda: [_parquet(_products())],
            formats.parquet_file,
        ),
        Parser("saved-items", "items.parquet", _read_saved_items, _saved_items, formats.parquet_file),
        Parser(
            "items-item",
            "products.item",
            _read_items,
            lambda: [
                _atomic(_products(), ["token", "token_seq", "float"]),
                _atomic({**_products(), "v": ["1 2", "3 4", ""]}, ["token", "token_seq", "float", "float_seq"]),
            ],
            _TAB,
        ),
        Parser("impressions-csv", "shown.csv", _read_impressions, lambda: [_text(_impressions(), ",")], _COMMA),
        Parser(
            "embeddings-npy",
            "vectors.npy",
            _read_embeddings,
            lambda: [
                _npy(_matrix(6, 4)),
                _npy(_matrix(6, 4).astype(np.float16)),
                _npy(np.asfortranarray(_matrix(6, 4))),
                _npy(np.arange(24).reshape(6, 4), (2, 0)),
            ],
            formats.npy_file,
        ),
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
        Parser(
            "config",
            "config.json",
            _read_config,
            partial(_file, _model_folder, "config.json"),
            formats.json_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "reward-config",
            "config.json",
            _read_reward_config,
            partial(_file, _reward_folder, "config.json"),
            formats.json_file,
            partial(_copy, _reward_folder),
        ),
        Parser(
            "processor-config",
            "processor_config.json",
            _read_processor,
            partial(_file, _model_folder, "processor_config.json"),
            formats.json_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "tokenizer-config",
            "tokenizer_config.json",
            _read_processor,
            partial(_file, _model_folder, "tokenizer_config.json"),
            formats.json_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "processor-catalogue",
            "catalogue.safetensors",
            _read_processor,
            partial(_file, _model_folder, "catalogue.safetensors"),
            formats.safetensors_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "model-config",
            "config.json",
            _read_model,
            partial(_file, _model_folder, "config.json"),
            formats.json_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "generation-config",
            "generation_config.json",
            _read_generation_config,
            partial(_file, _model_folder, "generation_config.json"),
            formats.json_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "weights",
            "model.safetensors",
            _read_model,
            partial(_file, _model_folder, "model.safetensors"),
            formats.safetensors_file,
            partial(_copy, _model_folder),
        ),
        Parser(
            "weights-index",
            "model.safetensors.index.json",
            _read_weights_index,
            _weights_index,
            formats.json_file,
            _sharded,
        ),
        Parser(
            "adapter-config",
            "adapter_config.json",
            _read_weights_index,
            _adapter_config,
            formats.json_file,
            _only_an_adapter,
        ),
        Parser(
            "reward-model-config",
            "config.json",
            _read_reward,
            partial(_file, _reward_folder, "config.json"),
            formats.json_file,
            partial(_copy, _reward_folder),
        ),
        Parser(
            "reward-items",
            "reward_items.safetensors",
            _read_reward_items,
            partial(_file, _reward_folder, "reward_items.safetensors"),
            formats.safetensors_file,
        ),
        Parser(
            "plan-config",
            "config.json",
            _read_plan_config,
            partial(_file, _model_folder, "config.json"),
            formats.json_file,
        ),
        Parser("plan-recipe", "options.yaml", _read_plan_recipe, _yaml_files, formats.yaml_file),
        Parser("yaml-options", "options.yaml", _read_yaml, _yaml_files, formats.yaml_file),
        Parser(
            "preferences-jsonl",
            "pairs.jsonl",
            _read_preferences,
            lambda: [_lines(_preferences())],
            formats.json_lines,
        ),
        Parser(
            "preferences-parquet",
            "pairs.parquet",
            _read_preferences,
            lambda: [_parquet(_preferences())],
            formats.parquet_file,
        ),
        Parser("histories", "histories.jsonl", _read_histories, _histories, formats.json_lines),
    )
}
