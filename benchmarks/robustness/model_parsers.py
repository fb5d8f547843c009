"""Parsers of models: configurations, processors, weights, adapters, recipes and options."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.robustness import formats
from benchmarks.robustness.fuzzing import Parser
from benchmarks.robustness.semantic_id_parsers import make_catalogue


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
    model.set_catalogue(make_catalogue())
    model.save_pretrained(folder, include_code=False)
    OneRecProcessor.from_catalogue(make_catalogue(), max_history=5).save_pretrained(folder, include_code=False)
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
def _recommender() -> Any:
    from onerec_hf import OneRecProcessor
    from onerec_hf.modeling.requests import Recommender

    return Recommender(_model(), OneRecProcessor.from_catalogue(_model().catalogue, max_history=5))


def _read_reward(path: Path) -> None:
    from onerec_hf.workflows.artefact import load_reward

    load_reward(str(path.parent))


def _read_reward_items(path: Path) -> None:
    from onerec_hf import RewardItems

    items = RewardItems.load(path)
    assert items.indices(items.item_ids).tolist() == list(range(len(items)))


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


MODEL_PARSERS = [
    Parser("histories", "histories.jsonl", _read_histories, _histories, formats.json_lines),
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
]
