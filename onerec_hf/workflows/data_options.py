"""The data options that a model was trained with: saved with the model, the defaults of later commands, and where the user's options differ."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.workflows.artefact import naming, write_bytes
from onerec_hf.workflows.distributed import is_first, say
from onerec_hf.workflows.settings import FEATURE_OPTIONS, data_options

if TYPE_CHECKING:
    from onerec_hf.modeling.features import FeatureSchema
    from onerec_hf.workflows.dataset import RecommendationDataset

DATA_OPTIONS_NAME = "data_options.json"
# Names of columns belong to a table, not to a model.
_COLUMNS = ("user_column", "item_column", "timestamp_column")
_SOURCES = ("dataset", "interactions", "prepared")
_TYPES: dict[str, type] = {"exclude_seen": bool}
_TYPES |= {each.name: type(each.default) for each in data_options()} | {"dataset": str}
_TYPES |= {"validation_start": str, "test_start": str, "history_feedback": str}
_LISTS = ("positive", "user_features", "item_features", "interaction_features")
_TYPES |= dict.fromkeys(_LISTS, list)
_OPTIONAL = ("dataset", "validation_start", "test_start", *_LISTS)


def save_data_options(
    folder: Path, data: RecommendationDataset, exclude_seen: bool, reads_features: bool = True
) -> None:
    """
    Writes the options of the data into the folder of a model; the first rank writes.

    Args:
        exclude_seen: whether rankings leave out the items of a user's history.
        reads_features: false leaves out the options of features: the model reads positive interactions only.
    """
    if is_first():
        options = {
            name: value for name, value in data.options.items() if reads_features or name not in FEATURE_OPTIONS
        }
        options["exclude_seen"] = exclude_seen
        write_bytes(folder / DATA_OPTIONS_NAME, (json.dumps(options, indent=1, ensure_ascii=False) + "\n").encode())


def read_data_options(option: str, repo: str | os.PathLike) -> dict[str, Any]:
    """
    The data options that a model was trained with.

    Args:
        option: where `repo` comes from, for the message.
        repo: folder or Hub repository of the model.

    Returns:
        Values by the names of [`~onerec_hf.workflows.DataSettings`], and `exclude_seen`; empty for a model of an earlier version, which has none saved. Options
        that this version does not have are left out.

    Raises:
        ValueError: no such model, or a damaged file.
    """
    with naming(option, str(repo)):
        return saved_data_options(repo)


def saved_data_options(repo: str | os.PathLike) -> dict[str, Any]:
    """
    `read_data_options`, where the caller names the model in errors.

    Raises:
        OSError, ValueError: no such model, or a damaged file.
    """
    from onerec_hf.modeling.files import find_file, read_json_object, short

    path = find_file(repo, DATA_OPTIONS_NAME)
    if path is None:
        return {}
    options = {name: value for name, value in read_json_object(path).items() if name in _TYPES}
    for name, value in options.items():
        fits = type(value) is _TYPES[name] and (name not in _LISTS or all(isinstance(each, str) for each in value))
        if not fits and not (value is None and name in _OPTIONAL):
            raise ValueError(
                f"{DATA_OPTIONS_NAME} is damaged: {name} is {short(value, 80)!r}; copy or download it again"
            )
    return options


def saved_schema(option: str, repo: str | os.PathLike) -> FeatureSchema | None:
    """
    The features that a model reads; None where it reads none.

    Raises:
        ValueError: as `read_data_options`.
    """
    from onerec_hf.modeling.features import FeatureSchema
    from onerec_hf.modeling.features_file import FEATURES_NAME
    from onerec_hf.modeling.files import find_file, read_safetensors

    with naming(option, str(repo)):
        path = find_file(repo, FEATURES_NAME)
        return (
            None
            if path is None
            else FeatureSchema.from_json(read_safetensors(path, framework="np")[1].get("schema", ""))
        )


def excludes_seen(option: str, repo: str | None) -> bool:
    """
    Whether rankings leave out the items of a user's history: as a model was trained; true for a new model or one of an earlier version.

    Raises:
        ValueError: as `read_data_options`.
    """
    return repo is None or read_data_options(option, repo).get("exclude_seen", True)


def options_to_take(given: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """
    The data options that a model was trained with and the user did not give. A prepared folder has its own.

    Args:
        given: single options by name, only those that the user gave.
        trained: from `read_data_options`.

    Example:
        >>> trained = {"dataset": "movielens", "max_history": 10, "stride": 2, "exclude_seen": True}
        >>> options_to_take({"interactions": "new.csv", "max_history": 20}, trained)
        {'stride': 2}
    """
    if given.get("prepared") is not None:
        return {}
    known = {each.name for each in data_options()} - given.keys()
    if any(given.get(name) is not None for name in _SOURCES):
        known -= {"dataset"}
    return {name: value for name, value in trained.items() if name in known}


def say_differences(data: RecommendationDataset, trained: Mapping[str, Any]) -> None:
    """Prints a line where the options of the data differ from those that a model was trained with."""
    if text := differences(data.options, trained):
        say(text)


def differences(options: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """
    Where data options differ from those that a model was trained with; empty where they do not. Names of columns are not compared.

    Args:
        options: of the data in use.
        trained: from `read_data_options`.

    Example:
        >>> differences({"min_item_interactions": 3, "stride": 1}, {"min_item_interactions": 5, "stride": 1})
        '--min_item_interactions 3: the model was trained with 5'
    """
    different = [
        f"--{name} {_spelled(options[name])}: the model was trained with {_spelled(value)}"
        for name, value in trained.items()
        if name in options
        and name not in _COLUMNS
        and options[name] != value
        # Another source of data is the user's choice, unless both are named.
        and (name != "dataset" or None not in (options[name], value))
    ]
    return "; ".join(different)


def _spelled(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, list):
        return shlex.join(value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def option_words(options: Mapping[str, Any]) -> list[str]:
    """
    Options as on the command line, without those that are None.

    Example:
        >>> option_words({"positive": ["rating>=4", "like>=1"], "exclude_seen": False, "dataset": None})
        ['--positive', 'rating>=4', 'like>=1', '--exclude_seen', 'false']
    """
    words = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return words
