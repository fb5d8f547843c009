"""The Hub: the code that travels with a checkpoint, the checkpoint format, and the weights that are refused."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .files import find_file, listed, pinned, read_json_object, refusing, replacing_files, short
from .hub_record import complete_push

logger = logging.get_logger(__name__)

# What a config.json may not decide: transformers would import a kernel of the Hub, or a package, by these names.
_CALLERS_ONLY = (
    "attn_implementation",
    "experts_implementation",
    "quantization_config",
    "fusion_config",
    "distributed_config",
)
# Increased when earlier code cannot read new checkpoints correctly.
FORMAT_VERSION = 2
# Of models with features, which earlier code would load without them.
FEATURES_FORMAT_VERSION = 3
#: The folder of a repository that holds the code.
CODE_FOLDER = "code"
_WEIGHTS, _PICKLES = "model.safetensors", ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MOST_ADAPTERS = 4
_ADAPTER, _PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
# Of an earlier save into the same folder: whole weights where there are shards now would be loaded in their place. Code was beside the weights once.
_FORMER_WEIGHTS = ("*_onerec.py", _WEIGHTS, "model-?????-of-?????.safetensors", f"{_WEIGHTS}.index.json")


def checked_format(config: dict) -> dict:
    """
    Checks the content of a config.json for a config class's `from_dict`, and sets today's format version. The attention and experts
    implementations and the quantization that it names are left out: only the caller of `from_pretrained` chooses them.

    Raises:
        ValueError: a newer onerec_hf wrote it, or it names another weights file.

    Example:
        >>> checked_format({"hidden_size": 32})
        {'hidden_size': 32, 'format_version': 2}
    """
    version = config.get("format_version", 1)
    if not (isinstance(version, int) and version <= FEATURES_FORMAT_VERSION):
        raise ValueError(
            f"this checkpoint is written in format version {version!r:.40}, and this onerec_hf reads up to version {FEATURES_FORMAT_VERSION}: "
            "upgrade it (pip install -U onerec-hf)"
        )
    if config.get("transformers_weights") is not None:  # would bypass `check_weights`
        raise ValueError(
            f"config.json names the weights file {config['transformers_weights']!r:.80}; a OneRec repository's weights are "
            f"{_WEIGHTS}, whole or in shards"
        )
    chosen = [name for name in config if name.strip("_").removesuffix("_internal") in _CALLERS_ONLY]
    if named := [name for name in chosen if config[name] is not None]:
        logger.warning_once(f"config.json names {listed(named)}: left out, pass it to from_pretrained() to use it")
    config = {name: value for name, value in config.items() if name not in chosen} | {"format_version": FORMAT_VERSION}
    if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
        # With a pipeline in the config, `pipeline()` would require trust_remote_code; the installed package has the class.
        config.pop("custom_pipelines", None)
    return config


@contextmanager
def reading_config(repo: str | os.PathLike) -> Iterator[None]:
    """
    Converts library errors about a config.json to one error that names its repository.

    Raises:
        ValueError: in place of those; no file, no access and the like remain OSErrors.
    """
    with refusing(f"config.json of {os.fspath(repo)}"):
        try:
            yield
        except StrictDataclassError as error:
            raise ValueError(short(error.__cause__ or error, 500)) from error


class CheckedConfig:
    """Mixin of configs: refuses a newer checkpoint format, and names the repository in errors about its config.json."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(checked_format(config_dict), **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        with reading_config(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]


def check_sizes(config, sizes: str, layers: str) -> None:
    """
    Refuses sizes that no model has: a config.json of a few hundred bytes could otherwise request any amount of memory
    and time: a layer's modules take some milliseconds to make, before a weight is found to be missing.

    Raises:
        ValueError: one of `sizes` (names, with blanks between them) is not between 1 and 2^31, or one of `layers` not between 0 and 512.

    Example:
        >>> from types import SimpleNamespace
        >>> check_sizes(SimpleNamespace(hidden_size=64, encoder_layers=10**9), "hidden_size", "encoder_layers")
        Traceback (most recent call last):
        ...
        ValueError: encoder_layers=1000000000 must lie between 0 and 512
    """
    for names, low, high in ((sizes, 1, 2**31), (layers, 0, 512)):
        for name in names.split():
            if not low <= getattr(config, name) <= high:
                raise ValueError(f"{name}={getattr(config, name)!s:.40} must lie between {low} and {high}")


def check_complete(loaded: dict) -> None:
    """
    Refuses a checkpoint that lacks weights: transformers initialises them at random, with a log line only.

    Args:
        loaded: the loading info of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ValueError: how many, and the first.
    """
    lacking = sorted(loaded["missing_keys"]) + sorted(str(key[0]) for key in loaded["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"{len(lacking)} of the weights are not in its files, or of another shape (first: {lacking[0]:.80}); copy or download them again"
        )


def check_weights(
    repo: str | os.PathLike, variant: str | None = None, _adapters: int = 0, **kwargs
) -> str | os.PathLike:
    """
    Refuses weights that would be unpickled, or that are outside the repository. Takes `from_pretrained`'s hub arguments.

    Returns:
        The repository that holds the weights: `repo`, or the base model of an adapter.

    Raises:
        ValueError: only pickled weights, or an index that names anything but safetensors files beside it.
        OSError: no weights at all.
    """
    weights = _WEIGHTS if variant is None else f"model.{variant}.safetensors"
    if find_file(repo, weights, **kwargs):
        return repo
    index_name = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    index = find_file(repo, index_name, **kwargs)
    if index is None:
        for name in _PICKLES:
            if find_file(repo, name, **kwargs):
                raise _pickled(repo, name, weights)
        adapter = find_file(repo, "adapter_config.json", **kwargs)
        if adapter is None:
            raise OSError(f"{repo} holds no weights: no file named {weights} or {index_name}")
        base = read_json_object(adapter).get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ValueError(f"{adapter} names no base model (base_model_name_or_path)")
        if _adapters >= _MOST_ADAPTERS:
            raise ValueError(f"{adapter}: {_adapters} adapters on each other, and no weights beneath them")
        try:
            return check_weights(base, variant, _adapters + 1, **{**kwargs, "revision": None})
        except OSError as error:
            raise OSError(f"{adapter} names the base model {base!r:.80}: {short(error, 500)}") from error
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} names no weights files (weight_map)")
    shards = shards.values()
    for shard in sorted(set(shards)):
        if not shard.endswith(".safetensors") or "/" in shard or "\\" in shard:
            raise ValueError(
                f"{repo}: {index_name} names the weights file {shard!r:.80}; only safetensors files beside it are loaded"
            )
    return repo


def _quantization(repo: str | os.PathLike, kwargs: dict) -> dict | None:
    """The `quantization_config` of a repository's config.json."""
    path = find_file(repo, "config.json", **kwargs)
    found = None if path is None else read_json_object(path).get("quantization_config")
    return found if isinstance(found, dict) else None


def _pickled(repo: str | os.PathLike, name: str, wanted: str) -> ValueError:
    return ValueError(
        f"{repo} holds pickled weights ({name}) and no {wanted}. Reading a pickle can run any code, so OneRec loads safetensors only: "
        "ask its author to save it again with save_pretrained()"
    )


class CarriesCode:
    """
    Mixin of classes that are saved with their code, so that a repository loads with `trust_remote_code=True` where onerec_hf is not installed.
    Where it is installed, the package's classes are used.
    """

    #: Default of `include_code` in `save_pretrained` and `push_to_hub`. Trainers call them without it: set it on model and processor for
    #: `push_to_hub=True` in training arguments.
    include_code: bool = True
    #: Folder or repository that card, results and codebooks are copied from in a push, and its revision: where this was loaded from, or
    #: where a workflow saved it.
    record_of: tuple[str, str | None] | None = None
    #: Files beside the weights that are written before the library lists a folder.
    _files_beside: tuple[str, ...] = ()

    def push_to_hub(self, repo_id: str, *, include_code: bool | None = None, **kwargs):
        """
        Uploads to the Hub everything that [`save_pretrained`] writes: the item catalogue too, with the model as with the processor.
        Card, results, codebooks and titles of the folder or repository that it was loaded from come along; card and results only with the
        weights that they describe. A card of yours in the repository is kept.
        Push both into one repository (a processor made from a model's repository alone has no `max_history`):

            model.push_to_hub("me/onerec-movies")
            processor.push_to_hub("me/onerec-movies")

        Args:
            repo_id: "name" or "owner/name"; made where there is none.
            include_code: upload the code as well (500 kB), so that the repository loads with `trust_remote_code=True` where onerec_hf
                is not installed. The attribute [`include_code`], `True` unless changed, when not given.
            kwargs: as for `transformers.PreTrainedModel.push_to_hub`: `private`, `token`, `revision`, `create_pr`, `commit_message`,
                `max_shard_size`, `tags`.
        """
        before = self.include_code
        self.include_code = before if include_code is None else include_code
        try:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        finally:
            self.include_code = before

    def _get_files_timestamps(self, working_dir):
        # `save_pretrained(push_to_hub=True)` uploads files that are newer than these. Ours were written just before.
        times = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in times.items() if name != CODE_FOLDER and name not in self._files_beside}

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        complete_push(working_dir, repo_id, self)
        with warnings.catch_warnings():
            # The table of titles is meant to be in the model's repository.
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
            return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def _save_code(self, folder: str | os.PathLike) -> None:
        # The room travels whole: a trainer that pushes while it trains saves only the processor and the weights.
        target = Path(folder) / CODE_FOLDER
        target.mkdir(exist_ok=True)
        for file in Path(__file__).parent.glob("*.py"):
            if file.name != "__init__.py":
                shutil.copyfile(file, target / file.name)


def in_code(reference: str) -> str:
    """
    A class of the repository's code, as `auto_map` names it.

    Example:
        >>> in_code("modeling_onerec.OneRecModel")
        'code/modeling_onerec.OneRecModel'
    """
    return f"{CODE_FOLDER}/{reference}"


class HubModel(CarriesCode):
    """Mixin of models: safetensors only, code next to the weights, and the files of `_save_beside` and `_load_beside`."""

    #: What the Auto classes find in the repository's code, "module.Class" by the Auto class's name.
    _auto_map: dict[str, str] = {}
    #: The pipelines of the repository's code by their task, as transformers writes them into the config.
    _custom_pipelines: dict[str, dict] = {}
    #: Files beside the weights that an earlier save may have left, and this one may not write.
    _former_beside: tuple[str, ...] = ()
    #: Patterns of weights' names in older formats, and what they are called now.
    _former_weights: dict[str, str] = {}

    def _save_beside(self, folder: str | os.PathLike) -> None:
        """Writes the files of the model other than its weights."""

    def _load_beside(self, repo: str | os.PathLike, **kwargs) -> None:
        """Reads it back."""

    def save_pretrained(
        self, save_directory, *args, is_main_process: bool = True, include_code: bool | None = None, **kwargs
    ):
        """
        Writes weights (safetensors), configs, the item catalogue and the code. They are moved into the folder when all of them are written,
        `config.json` last: an interrupted save leaves no half-written model.

        Args:
            save_directory: the folder.
            include_code: write the code, as for [`push_to_hub`].
            args, is_main_process, kwargs: as for `transformers.PreTrainedModel.save_pretrained`.

        Raises:
            OSError: a full or read-only disk; the folder stays as it was.
        """
        saves = self.should_save_on_this_rank(is_main_process)  # type: ignore[attr-defined]
        if not saves or kwargs.get("distributed_checkpoint"):  # which all ranks write, each its part
            super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
            return
        config, adapter_only = self.config, getattr(self, "_hf_peft_config_loaded", False)  # type: ignore[attr-defined]
        last, former = (
            ("adapter_config.json", ()) if adapter_only else ("config.json", (*_FORMER_WEIGHTS, *self._former_beside))
        )
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)  # the library would take the temporary folder's
        with replacing_files(save_directory, last, () if kwargs.get("variant") else former) as temporary:
            self._save_beside(temporary)
            if (self.include_code if include_code is None else include_code) and not adapter_only:
                self._save_code(temporary)
                config.auto_map = {name: in_code(reference) for name, reference in self._auto_map.items()}
                if self._custom_pipelines:
                    config.custom_pipelines = {
                        task: {**pipeline, "impl": in_code(pipeline["impl"])}
                        for task, pipeline in self._custom_pipelines.items()
                    }
            else:
                for name in ("auto_map", "custom_pipelines"):  # from the repository that it was loaded from
                    vars(config).pop(name, None)
            super().save_pretrained(temporary, *args, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Loads a model and what was saved beside it from a folder or a Hub repository; arguments as for
        `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: pickled weights, a checkpoint in a newer format, another model's catalogue.
            OSError: the library's own errors: no such repository or revision, no access, no connection, no weights.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("OneRec loads safetensors only; leave use_safetensors=False out")
        repo, source, quantization = pretrained_model_name_or_path, None, None
        if repo is not None:
            kwargs = pinned(repo, kwargs)
            source = check_weights(repo, **kwargs)
            quantization = _quantization(source, kwargs if source == repo else {**kwargs, "revision": None})
        renamed = bool(cls._former_weights) and kwargs.get("key_mapping") is None
        if renamed:
            kwargs["key_mapping"] = dict(cls._former_weights)
        if quantization is not None:
            loaded = cls._from_quantized(repo, quantization, *model_args, **kwargs)
        else:
            loaded = super().from_pretrained(repo, *model_args, use_safetensors=True, **kwargs)  # type: ignore[misc]
        _say_unquantized(loaded[0] if isinstance(loaded, tuple) else loaded)
        if source is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with output_loading_info=True
            model.record_of = (os.path.abspath(repo) if os.path.isdir(repo) else str(repo), kwargs.get("revision"))
            if renamed:
                model._weight_conversions = None  # the library would save under the former names
            places: list[tuple[str | os.PathLike | None, dict]] = [
                (source, kwargs if source == repo else {**kwargs, "revision": None})
            ]
            # An adapter may come with a later catalogue than its base. The Auto classes pass the base here, and the adapter in `adapter_kwargs`.
            adapter = kwargs.get("adapter_kwargs") or {}
            if source != repo:
                places.append((repo, kwargs))
            elif "_adapter_model_path" in adapter:
                places.append((adapter["_adapter_model_path"], {**kwargs, **adapter}))
            for place, hub in places:
                try:
                    model._load_beside(place, **hub)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
        return loaded

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As `torch.nn.Module.load_state_dict`; a tied weight, which files hold once, counts for all of its names."""
        tied = getattr(self, "all_tied_weights_keys", {})
        for name, source in tied.items():  # in order: a source may be tied itself
            if name not in state_dict and source in state_dict:
                state_dict = {**state_dict, name: state_dict[source]}
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _from_quantized(cls, repo, quantization: dict, *model_args, **kwargs):
        """Loads a repository whose config.json has a `quantization_config`: with it where the caller passes one, else without."""
        if kwargs.get("quantization_config") is not None:
            config = kwargs.pop("config", None)
            if config is None:
                config, kwargs = cls.config_class.from_pretrained(repo, return_unused_kwargs=True, **kwargs)  # type: ignore[attr-defined]
            config.quantization_config = quantization
            return super().from_pretrained(repo, *model_args, config=config, use_safetensors=True, **kwargs)  # type: ignore[misc]
        wanted = kwargs.pop("output_loading_info", False)
        try:
            loaded = super().from_pretrained(
                repo, *model_args, use_safetensors=True, output_loading_info=True, **kwargs
            )  # type: ignore[misc]
            check_complete(loaded[1])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{repo}: its weights were saved quantized ({quantization.get('quant_method')!s:.40}), and a config.json does not choose "
                "that alone; pass quantization_config to from_pretrained()"
            ) from error
        return loaded if wanted else loaded[0]

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """Adds a PEFT adapter, as `transformers.PreTrainedModel.load_adapter` does; a pickled one is refused with a ValueError."""
        if peft_model_id is not None:
            hub = {**(kwargs.get("adapter_kwargs") or {}), **kwargs}
            if not find_file(peft_model_id, _ADAPTER, **hub) and find_file(peft_model_id, _PICKLED_ADAPTER, **hub):
                raise _pickled(peft_model_id, _PICKLED_ADAPTER, _ADAPTER)
        return super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]


def _say_unquantized(model) -> None:
    """Warns where a quantised model keeps most of its weights as they are: the libraries convert linear layers, and experts are packed parameters."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    left = [
        weight
        for name, weight in model.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj")) and weight.ndim == 3
    ]
    bytes_left = sum(weight.numel() * weight.element_size() for weight in left)
    share = bytes_left / max(1, sum(weight.numel() * weight.element_size() for weight in model.parameters()))
    if share > 0.1:
        warnings.warn(
            f"quantization converts linear layers only: the experts, {share:.0%} of the bytes, stay in {left[0].dtype}. Pass dtype=torch.bfloat16 "
            "too, which halves them, or use a model with num_experts=1"
        )


__all__ = [
    "CODE_FOLDER",
    "FEATURES_FORMAT_VERSION",
    "FORMAT_VERSION",
    "CarriesCode",
    "CheckedConfig",
    "HubModel",
    "check_complete",
    "check_sizes",
    "check_weights",
    "checked_format",
    "reading_config",
]
