"""The folder of a model: processor, weights and semantic IDs loaded with errors that name the folder, and saved so that a killed run leaves no damaged one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from onerec_hf.modeling.files import UNEXPECTED, short
from onerec_hf.workflows.distributed import is_first, say

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import Trainer

    from onerec_hf.baselines import ItemIndex, SequentialRecommender
    from onerec_hf.baselines.memory import RankingBaseline
    from onerec_hf.data import ItemTable
    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.modeling.requests import Recommender
    from onerec_hf.semantic_ids import SemanticIDs
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder
    from onerec_hf.workflows.settings import ModelSettings

# ITEMS_NAME is modeling.requests' too; importing it from there would import torch when the command line prints help.
CODEBOOKS_NAME, REPORT_NAME, ITEMS_NAME = "codebooks.safetensors", "semantic_ids.json", "items.parquet"
#: What embeds new items: for semantic IDs, and for the content vectors of the item head.
ITEM_ENCODER_NAME, CONTENT_ENCODER_NAME = "item_encoder.safetensors", "content_encoder.safetensors"


#: The `model_type` of sequence models.
SEQUENTIAL = "onerec_baseline"
#: The names of saved baselines by their `model_type`.
RANKINGS = {"onerec_popularity": "popularity", "onerec_item_knn": "item_knn"}


@contextlib.contextmanager
def naming(option: str, repo: str) -> Iterator[None]:
    """
    Converts library errors about an absent or damaged artefact to one error that names the option and the folder.

    Raises:
        ValueError: in place of those.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{option} {repo}: the weights are damaged or cut short ({error}); copy or download them again, or train anew"
        ) from error
    except (OSError, StrictDataclassError, *UNEXPECTED) as error:
        plain = isinstance(error, OSError | ValueError | StrictDataclassError)
        reason = short(error, 1000) if plain else f"it is damaged ({type(error).__name__}: {short(error)})"
        if not os.path.isdir(repo):
            reason = f"there is no such folder, and as a repository of the Hub: {reason.splitlines()[0]}"
        raise ValueError(f"{option} {repo}: {reason}") from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the library's bars of loading and saving weights: they end in the same second, and fill logs."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def load_processor(option: str, repo: str) -> OneRecProcessor:
    """
    The processor of a folder or Hub repository, with its catalogue.

    Raises:
        ValueError: it is not there, damaged, or without a catalogue.
    """
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    with naming(option, repo):
        processor = OneRecProcessor.from_pretrained(repo)
        if processor.catalogue is None:
            raise ValueError(
                "it holds no item catalogue (catalogue.safetensors); name what `onerec-hf semantic-ids fit` or `train` wrote"
            )
        processor.catalogue.verify()
    return processor


def catalogue_of(processor: OneRecProcessor) -> ItemCatalogue:
    """The catalogue of a processor, which every processor of a workflow has."""
    assert processor.catalogue is not None
    return processor.catalogue


def load_model(
    option: str, repo: str, attn_implementation: str | None = None, dtype: str | None = None
) -> OneRecForConditionalGeneration:
    """
    The generator of a folder or Hub repository.

    Args:
        dtype: "float32", "bfloat16" or "auto" ([`~onerec_hf.modeling.cpu_experts.inference_dtype`]); as it was saved by default.

    Raises:
        ValueError: it is not there, damaged, or its catalogue is another model's.
    """
    from transformers import AutoModelForSeq2SeqLM

    from onerec_hf.modeling.hub import check_complete
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration

    with naming(option, repo), without_bars():
        if os.path.isdir(repo) and not os.path.isfile(os.path.join(repo, "config.json")):
            raise ValueError("it holds no model (config.json); name what `onerec-hf train` or `quickstart` wrote")
        model, loaded = AutoModelForSeq2SeqLM.from_pretrained(
            repo, use_safetensors=True, attn_implementation=attn_implementation, output_loading_info=True
        )
        check_complete(loaded)
        if not isinstance(model, OneRecForConditionalGeneration):
            raise ValueError(f"it holds a {type(model).__name__}, no OneRec generator")
    return model if dtype is None else in_dtype(model, dtype)


def in_dtype(model: OneRecForConditionalGeneration, name: str) -> OneRecForConditionalGeneration:
    """The generator in the dtype of a `--dtype` option; what `auto` chose is said, and a lower precision."""
    from onerec_hf.modeling.cpu_experts import inference_dtype

    dtype = inference_dtype(name, model.config.hidden_size)
    if name != "float32":
        say(f"--dtype {name}: the model computes in {str(dtype).removeprefix('torch.')}")
    return model.to(dtype)  # pyright: ignore[reportArgumentType]


def check_dtype(name: str, repo: str) -> None:
    """
    Raises:
        ValueError: an unknown `--dtype`, or bfloat16 for a model that is no generator.
    """
    from onerec_hf.baselines.requests import ITEM_MODEL_TYPES
    from onerec_hf.modeling.cpu_experts import DTYPES

    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: choose auto, float32 or bfloat16")
    if name == "bfloat16" and (kind := model_type(repo)) in ITEM_MODEL_TYPES:
        raise ValueError(f"--dtype bfloat16 is for OneRec generators, and {repo} holds a {kind}; leave it out")


def load_reward(path: str, option: str = "--reward") -> OneRecForSessionReward:
    """
    The session reward model of a folder or Hub repository.

    Args:
        option: where the path comes from, for the message.

    Raises:
        ValueError: it is absent, damaged or another kind of model.
    """
    from transformers import AutoModelForSequenceClassification

    from onerec_hf.modeling.hub import check_complete
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

    with naming(option, path), without_bars():
        model, loaded = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        check_complete(loaded)
        if not isinstance(model, OneRecForSessionReward):
            raise ValueError(f"it holds a {type(model).__name__}, no OneRec reward model")
        return model


def model_type(repo: str) -> str | None:
    """The `model_type` in the config.json of a folder or Hub repository; None where that cannot be read."""
    return saved_config(repo, "config.json").get("model_type")


def saved_sizes(repo: str) -> dict[str, Any]:
    """
    What the training examples of a saved generator must fit: `encoder_is_causal`, `session_length`, `max_history`, `pathways`, `lifelong` and `item_head`, as far as
    they can be read. Loading the model tells what is wrong with it.
    """
    found = saved_config(repo, "config.json") | saved_config(repo, "processor_config.json")
    return {
        name: found[name]
        for name in ("encoder_is_causal", "session_length", "max_history", "pathways", "lifelong", "item_head")
        if found.get(name) is not None
    }


def saved_config(repo: str, name: str) -> dict[str, Any]:
    """A JSON object of a folder or Hub repository; empty where that cannot be read."""
    from transformers.utils.hub import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        path = cached_file(repo, name, **quietly)
        config = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, *UNEXPECTED):
        return {}
    return config if isinstance(config, dict) else {}


def load_sequential(option: str, repo: str) -> SequentialRecommender:
    """
    The sequence model (SASRec, HSTU, GRU4Rec, ACVAE) of a folder or Hub repository.

    Raises:
        ValueError: it is absent, damaged or without item ids.
    """
    from onerec_hf.baselines import SequentialRecommender

    with naming(option, repo), without_bars():
        model = cast("SequentialRecommender", SequentialRecommender.from_pretrained(repo))
        if model.items is None:
            raise ValueError("it holds no item ids; save the model with its items (set_items)")
        model.check_schema()
        return model


def load_ranking(option: str, repo: str) -> tuple[RankingBaseline, ItemIndex]:
    """
    Popularity or item-kNN of a folder or Hub repository, and the ids of its items.

    Raises:
        ValueError: it is absent, damaged or another kind of model.
    """
    from onerec_hf.baselines import load_ranking
    from onerec_hf.serving.models import find_folder

    with naming(option, repo):
        return load_ranking(find_folder(repo))


#: Takes a model's folder and catalogue, and returns the items' fields by item id.
LoadItems = Callable[[Any, Any], "Mapping[Any, Mapping] | None"]


def recommender_of(folder: Path, load_items: LoadItems | None = None, dtype: str = "float32") -> Recommender:
    """
    What answers requests with the model of a folder, of any kind, its weights parted from the files.

    Args:
        load_items: those saved with the model by default.
        dtype: of a generator, as for [`load_model`].

    Raises:
        ValueError, OSError: it is absent, damaged or of an unknown kind.
    """
    from onerec_hf.baselines.requests import ITEM_MODEL_TYPES, load_item_recommender
    from onerec_hf.modeling.items_file import saved_items
    from onerec_hf.serving.models import load_generator, model_type

    load_items = load_items or saved_items
    with without_bars():
        if model_type(folder) in ITEM_MODEL_TYPES:
            return load_item_recommender(folder, load_items)
        recommender = load_generator(folder, load_items)
    in_dtype(recommender.model, dtype)
    return recommender


def load_recommender(option: str, repo: str, load_items: LoadItems, dtype: str = "float32") -> Recommender:
    """
    What answers requests with the model of a folder or Hub repository, of any kind.

    Args:
        dtype: of a generator, as for [`load_model`].

    Raises:
        ValueError: it is absent, damaged or of an unknown kind.
    """
    import torch

    from onerec_hf.baselines.requests import ITEM_MODEL_TYPES, load_item_recommender
    from onerec_hf.modeling.requests import Recommender
    from onerec_hf.serving.models import find_folder

    if model_type(repo) in ITEM_MODEL_TYPES:
        with naming(option, repo), without_bars():
            return load_item_recommender(find_folder(repo), load_items)
    processor, model = load_processor(option, repo), load_model(option, repo, dtype=dtype).eval()
    if torch.accelerator.is_available():
        model.to(device=torch.accelerator.current_accelerator())  # pyright: ignore[reportCallIssue]
    with naming(option, repo):
        return Recommender(model, processor, load_items(repo, catalogue_of(processor)))


def new_model(
    settings: ModelSettings, processor: OneRecProcessor, session_length: int, content: np.ndarray | None = None
) -> OneRecForConditionalGeneration:
    """
    An untrained generator for the processor's catalogue.

    Args:
        content: (items, d) content vectors of the catalogue's items, for an item head with content.

    Raises:
        ValueError: sizes that do not fit together, or an unknown attention implementation.
    """
    import torch

    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.modeling_onerec_v2 import OneRecV2ForConditionalGeneration

    assert processor.catalogue is not None
    if settings.pathways is not None and processor.features is None:
        raise ValueError(
            "--pathways needs --history_feedback all: histories of positive interactions have one pathway"
        )
    catalogue, width = processor.catalogue, 0 if content is None else content.shape[1]
    config = settings.config(catalogue.codebook_sizes, session_length, len(catalogue), width, processor.features)
    kind = OneRecV2ForConditionalGeneration if settings.architecture == "onerec_v2" else OneRecForConditionalGeneration
    model = kind._from_config(config, attn_implementation=settings.attn_implementation)
    model.set_catalogue(catalogue)
    if content is not None:
        codes, vectors = torch.tensor(catalogue.codes, dtype=torch.long), torch.from_numpy(content)
        head: Any = model.get_encoder().item_head
        head.set_content(codes, vectors)
    set_ranking_weights(model, settings.item_score_weight, settings.decoder_weight)
    return model


def set_ranking_weights(
    model: OneRecForConditionalGeneration, item_score_weight: float | None, decoder_weight: float | None = None
) -> None:
    """Sets the defaults of `recommend()` and `generate()`, which are saved with the model; None keeps the present one."""
    for name, weight in (("item_score_weight", item_score_weight), ("decoder_weight", decoder_weight)):
        if weight is not None and model.generation_config is not None:
            setattr(model.generation_config, name, weight)  # fields of ours


def check_finite(model: torch.nn.Module) -> None:
    """
    Raises:
        FloatingPointError: weights that are not finite, after a training that diverged.
    """
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} of the model's weights are not finite, e.g. {bad[0]}: the training diverged. Train again with a lower "
            "--learning_rate"
        )


def save_trained(trainer: Trainer, folder: Path) -> None:
    """
    Saves the model of a trainer, without the pickle of arguments that Trainer adds: no file of an artefact is unpickled. `config.json`
    comes last, so a folder with a config.json holds a complete model.
    """
    from onerec_hf.modeling.files import replacing_files

    if not trainer.args.should_save:
        trainer.save_model(str(folder))
        return
    with replacing_files(folder, last="config.json") as temporary:
        trainer.save_model(temporary)
        Path(temporary, "training_args.bin").unlink(missing_ok=True)


def save_processor(processor: OneRecProcessor, folder: Path, items: ItemTable | None = None) -> None:
    """
    Saves the processor with its catalogue; the first rank writes.

    Args:
        items: the items table of the data, for `write_items`; None if there is none or it is not saved.
    """
    write_items(folder, items, processor)
    if is_first():
        processor.save_pretrained(folder)


def recorded_in(folder: Path, *parts: Any) -> None:
    """Tells model and processor which folder holds their card, results and codebooks: `push_to_hub` takes them along."""
    for part in parts:
        part.record_of = (str(folder.resolve()), None)


def write_items(folder: Path, items: ItemTable | None, processor: OneRecProcessor) -> None:
    """
    Writes titles and other columns of an items table into `items.parquet` next to the catalogue; the first rank writes. Items that the table
    does not hold keep what `write_origin` wrote for them.
    """
    if items is not None and processor.catalogue is not None and is_first():
        from onerec_hf.data.item_fields import save_items_table

        if left_out := save_items_table(folder, items, processor.catalogue, keep=True):
            say(left_out)
    path = folder / ITEMS_NAME
    processor.items_file = str(path) if path.is_file() else None  # saved with the processor


def find_origin(repo: str | os.PathLike, with_items: bool = True) -> dict[str, bytes]:
    """
    The files that belong to the semantic IDs in a folder or Hub repository, as far as it has them: codebooks, encoders of new items, report, and
    `with_items` the items table. A run that reuses the semantic IDs copies these files.
    """
    from transformers.utils.hub import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    names = [
        CODEBOOKS_NAME,
        REPORT_NAME,
        ITEM_ENCODER_NAME,
        CONTENT_ENCODER_NAME,
        *([ITEMS_NAME] if with_items else []),
    ]
    paths = {name: cached_file(repo, name, **quietly) for name in names}
    return {name: Path(path).read_bytes() for name, path in paths.items() if path is not None}


def write_origin(folder: Path, origin: dict[str, bytes] | SemanticIDs, content: ItemEncoder | None = None) -> None:
    """
    Writes the result of `find_origin`, or codebooks, encoder and report of newly fitted semantic IDs; the first rank writes.

    Args:
        content: the encoder of new content vectors of the item head.
    """
    if not is_first():
        return
    if not isinstance(origin, dict):
        origin.quantizer.save(folder / CODEBOOKS_NAME)
        if origin.encoder is not None:
            origin.encoder.save(folder / ITEM_ENCODER_NAME)
        origin = {REPORT_NAME: (json.dumps(origin.report.as_dict(), indent=1) + "\n").encode()}
    for name, content_of in origin.items():
        write_bytes(folder / name, content_of)
    if content is not None:
        content.save(folder / CONTENT_ENCODER_NAME)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, to a temporary name first."""
    from onerec_hf.modeling.files import replacing

    with replacing(path) as temporary:
        Path(temporary).write_bytes(content)
