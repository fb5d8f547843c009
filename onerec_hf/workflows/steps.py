"""What several commands do: read data, embed and encode items, make a model, rank with baselines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onerec_hf.modeling.files import UNEXPECTED, short
from onerec_hf.workflows.distributed import all_ranks, is_first

if TYPE_CHECKING:
    from transformers import Trainer

    from onerec_hf.cli.arguments import DataArguments, ModelArguments, SemanticIDArguments
    from onerec_hf.data import LeaveOneOutSplit, RecommendationData, UserSequences
    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.semantic_ids import SemanticIDs


def say(text: str) -> None:
    """Progress goes to stderr: stdout belongs to results. Of several ranks the first one speaks."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


CODEBOOKS_NAME, REPORT_NAME = "codebooks.safetensors", "semantic_ids.json"
#: Stands in the folder of a run that has not ended, or was killed.
UNFINISHED_RUN = "unfinished.json"

# What the commands write: --overwrite removes these of an earlier run, and nothing else that may stand in the folder.
# Without the first two no model and no processor loads, so that half-removed results are not taken for whole ones.
_WRITTEN = (
    "config.json",
    "catalogue.safetensors",
    "README.md",
    "expert_load.png",
    "results.json",
    "pairs/README.md",
    "pairs/pairs.parquet",
    REPORT_NAME,
    CODEBOOKS_NAME,
    "model*.safetensors",
    "code/*.py",
    "*_onerec.py",
    "model.safetensors.index.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "training_args.bin",
)


def check_folder(folder: str | os.PathLike, overwrite: bool) -> Path:
    """
    The output folder, untouched so far: `claim_folder` makes it ready once the input has proved good. Of several ranks the first one looks:
    it may have begun to write when another comes.

    Raises:
        FileExistsError: it holds something already and `overwrite` was not given.
        PermissionError: nothing can be written there.
    """
    folder = Path(folder)
    if not is_first():
        return folder
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the output")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(
            f"{folder} cannot be written: {there} is read-only, or not yours; name a folder that can be written to"
        )
    if not overwrite and is_unfinished(folder):
        raise FileExistsError(
            f"{folder} holds a run that has not ended: go on with it by --resume_from_checkpoint last (a training), or begin it anew with "
            "--overwrite"
        )
    if not overwrite and any(path.is_file() for path in folder.rglob("*")):
        raise FileExistsError(
            f"{folder} exists already and is not empty; name another folder, or pass --overwrite to replace its results"
        )
    return folder


def is_unfinished(folder: str | os.PathLike) -> bool:
    """Whether the folder is that of a run that has not ended, or was killed."""
    return any(Path(folder).glob(f"{UNFINISHED_RUN}*"))  # its temporary name counts: killed there, a run has begun too


def claim_folder(folder: Path, keep_checkpoints: bool = False) -> None:
    """Makes the folder and removes an earlier run's results from it: they must not be taken for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(() if keep_checkpoints else ("checkpoints",)), "_removed-checkpoints", "aligned", ".unfinished"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in (*_WRITTEN, *(f"{name}.*.tmp" for name in (*_WRITTEN, UNFINISHED_RUN))):
        for path in folder.glob(pattern):
            path.unlink()


def discard(folder: Path) -> None:
    """Takes back what a run has written, and the folder if nothing else stands in it; the first rank does."""
    if not is_first():
        return
    claim_folder(folder)
    (folder / UNFINISHED_RUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def naming(option: str, repo: str) -> Iterator[None]:
    """
    Turns what the libraries raise about an artefact that is absent or damaged into one error that names the option and the folder.

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


def load_model(option: str, repo: str, attn_implementation: str | None = None) -> OneRecForConditionalGeneration:
    """
    The generator of a folder or Hub repository.

    Raises:
        ValueError: it is not there, damaged, or its catalogue is another model's.
    """
    from transformers import AutoModelForSeq2SeqLM

    from onerec_hf.modeling.hub import check_complete
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration

    with naming(option, repo):
        if os.path.isdir(repo) and not os.path.isfile(os.path.join(repo, "config.json")):
            raise ValueError("it holds no model (config.json); name what `onerec-hf train` or `quickstart` wrote")
        model, loaded = AutoModelForSeq2SeqLM.from_pretrained(
            repo, use_safetensors=True, attn_implementation=attn_implementation, output_loading_info=True
        )
        check_complete(loaded)
        if not isinstance(model, OneRecForConditionalGeneration):
            raise ValueError(f"it holds a {type(model).__name__}, no OneRec generator")
        return model


def save_trained(trainer: Trainer, folder: Path) -> None:
    """
    Saves what a trainer trained, without the pickle of arguments that Trainer adds: nothing in an artefact is unpickled. `config.json` comes
    last: a folder that has it is a whole model.
    """
    from onerec_hf.modeling.files import replacing_files

    if not trainer.args.should_save:
        trainer.save_model(str(folder))
        return
    with replacing_files(folder, last="config.json") as temporary:
        trainer.save_model(temporary)
        Path(temporary, "training_args.bin").unlink(missing_ok=True)


def find_origin(repo: str | os.PathLike) -> dict[str, bytes]:
    """
    The files that tell where the semantic IDs of a folder or Hub repository come from, codebooks and report, as far as it holds them: who
    takes the semantic IDs over keeps them.
    """
    from transformers.utils.hub import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    paths = {name: cached_file(repo, name, **quietly) for name in (CODEBOOKS_NAME, REPORT_NAME)}
    return {name: Path(path).read_bytes() for name, path in paths.items() if path is not None}


def write_origin(folder: Path, origin: dict[str, bytes] | SemanticIDs) -> None:
    """Writes what `find_origin` found, or codebooks and report of semantic IDs that were just fitted; the first rank does."""
    if not is_first():
        return
    if not isinstance(origin, dict):
        origin.quantizer.save(folder / CODEBOOKS_NAME)
        origin = {REPORT_NAME: (json.dumps(origin.report.as_dict(), indent=1) + "\n").encode()}
    for name, content in origin.items():
        write_bytes(folder / name, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, to a temporary name first."""
    from onerec_hf.modeling.files import replacing

    with replacing(path) as temporary:
        Path(temporary).write_bytes(content)


@dataclass(frozen=True)
class PreparedData:
    """Interactions that became sequences and examples, and which items they are about."""

    source: RecommendationData
    sequences: UserSequences
    split: LeaveOneOutSplit
    item_ids: np.ndarray
    protocol: str

    def train_rows(self) -> list[np.ndarray]:
        """Training sequences as positions in `item_ids`."""
        flat = np.searchsorted(self.item_ids, self.split.train_sequences.item_ids)
        return np.split(flat, self.split.train_sequences.offsets[1:-1])

    def counts(self) -> dict[str, int]:
        """How much of everything there is, for the card."""
        return {
            "interactions": len(self.source.interactions),
            "of them kept": len(self.sequences.item_ids),
            "users": len(self.sequences),
            "items": len(self.item_ids),
            "training examples": len(self.split.train),
            "validation examples": len(self.split.validation),
            "test examples": len(self.split.test),
        }


def prepare_data(args: DataArguments) -> PreparedData:
    """
    Reads the source, keeps positive feedback and frequent enough items, splits leave-one-out.

    Raises:
        ValueError: options that do not go together, or data that cannot be used.
    """
    from onerec_hf.data import DataError, PositiveFeedback, UserSequences, leave_one_out, load_files, load_source

    if args.prepared is not None:
        from onerec_hf.workflows.sharded_dataset import folder_data  # it builds on this module

        return folder_data(args)
    if args.eval_users is not None:
        raise ValueError("--eval_users goes with --prepared")
    if (args.dataset is None) == (args.interactions is None):
        raise ValueError("give either --dataset (a named source) or --interactions (your own table)")
    for option, value, needs, given in (
        ("--items", args.items, "--interactions", args.interactions),
        ("--embeddings", args.embeddings, "--items", args.items),
        ("--data_dir", args.data_dir, "--dataset", args.dataset),
    ):
        if value is not None and given is None:
            raise ValueError(f"{option} goes with {needs}; give both or neither")
    for option in ("min_item_interactions", "session_length", "max_history", "stride"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1; got {getattr(args, option)}")
    if args.interactions is None:
        assert args.dataset is not None
        source = load_source(args.dataset, args.data_dir)
    else:
        source = load_files(
            args.interactions,
            args.items,
            user_column=args.user_column,
            item_column=args.item_column,
            timestamp_column=args.timestamp_column,
            embeddings=args.embeddings,
        )
    positive = source.positive if args.positive is None else PositiveFeedback.parse(args.positive)
    sequences = UserSequences.from_interactions(positive.apply(source.interactions))
    try:
        sequences = sequences.k_core(min_user=1, min_item=args.min_item_interactions)
    except DataError as error:
        raise ValueError(f"--min_item_interactions {args.min_item_interactions}: {error}") from error
    split = leave_one_out(
        sequences, session_length=args.session_length, max_history=args.max_history, stride=args.stride
    )
    item_ids = sequences.item_counts()[0]
    protocol = (
        f"Positive feedback: {positive}; items with fewer than {args.min_item_interactions} positive interactions are left out. "
        f"{split.description}"
    )
    say(
        f"{source.name}: {len(source.interactions):,} interactions; {len(sequences.item_ids):,} of them, by {len(sequences):,} users "
        f"on {len(item_ids):,} items, are kept. {protocol}"
    )
    return PreparedData(source, sequences, split, item_ids, protocol)


def embed_items(data: PreparedData, args: SemanticIDArguments, rows: slice = slice(None)) -> tuple[np.ndarray, str]:
    """
    (items, d) float32 embeddings in the order of `data.item_ids` and a line that says how they were made. Learns from training rows only.

    Args:
        rows: the items to return. Where embeddings are given, and nothing else is asked for, the others are not read.
    """
    from onerec_hf.semantic_ids import (
        align_embeddings,
        behaviour_embeddings,
        combine_embeddings,
        cooccurring_pairs,
        text_embeddings,
    )

    kinds = args.embedding
    read = rows if kinds == "given" else slice(None)
    items = data.source.items.select(data.item_ids[read]) if data.source.items is not None else None
    if kinds == "auto":
        if items is None:
            kinds = "behaviour"
        else:
            kinds = "given+behaviour" if items.embeddings is not None else "text+behaviour"
    parts, weights = [], []
    given = None if items is None or items.embeddings is None else np.asarray(items.embeddings, dtype=np.float32)
    text = None if items is None else lambda: text_embeddings(items.frame["text"].tolist(), dim=args.embedding_dim)
    for kind in kinds.split("+"):
        if kind == "behaviour":
            parts.append(behaviour_embeddings(data.train_rows(), len(data.item_ids), dim=args.embedding_dim))
            weights.append(args.behaviour_weight)
        elif kind == "text" and text is not None:
            parts.append(text())
            weights.append(1.0)
        elif kind == "given" and given is not None:
            parts.append(given)
            weights.append(1.0)
        elif kind == "aligned" and text is not None:
            pairs = cooccurring_pairs(data.train_rows(), len(data.item_ids))
            parts.append(align_embeddings(text() if given is None else given, pairs, seed=args.semantic_id_seed))
            weights.append(1.0)
        else:
            raise ValueError(
                f"--embedding {args.embedding}: {kind!r} is not to be had; give text or embeddings with --items (and --embeddings), or use "
                "behaviour"
            )
    recipe = f"{kinds} (dim {args.embedding_dim}, behaviour weight {args.behaviour_weight:g})"
    vectors = combine_embeddings(parts, weights)
    return (vectors if kinds == "given" else vectors[rows]), recipe


def fit_catalogue(
    data: PreparedData, args: SemanticIDArguments, embedded: tuple[np.ndarray, str] | None = None
) -> SemanticIDs:
    """
    Semantic IDs for the items of `data`, with their training popularity; under torchrun every rank has a share of the items.

    Args:
        embedded: what `embed_items` gave, if it was asked before.
    """
    from onerec_hf.semantic_ids import fit_semantic_ids

    if min(args.codebook_sizes) < 1:
        raise ValueError(f"--codebook_sizes must hold positive numbers, one per level; got {args.codebook_sizes}")
    ranks = all_ranks()
    mine = slice(None) if ranks is None else ranks.share(len(data.item_ids))
    embeddings, recipe = embed_items(data, args, mine) if embedded is None else embedded
    popularity = np.bincount(np.concatenate(data.train_rows()), minlength=len(data.item_ids))
    say(f"semantic IDs: {len(data.item_ids):,} items from {recipe}, codebooks {args.codebook_sizes}")
    return fit_semantic_ids(
        data.item_ids[mine],
        embeddings,
        args.codebook_sizes,
        popularity=popularity[mine],
        recipe=recipe,
        method=args.quantizer,
        on_collision=args.on_collision,  # pyright: ignore[reportArgumentType] (checked there)
        max_iter=args.kmeans_iterations,
        seed=args.semantic_id_seed,
        ranks=ranks,
    )


def check_catalogue(option: str, processor: OneRecProcessor, data: PreparedData) -> None:
    """
    Checks that the processor's catalogue holds every item of the data.

    Args:
        option: where the catalogue comes from, for the message.

    Raises:
        ValueError: it does not (how many items, the first three), or its ids are of the other type.
    """
    cure = (
        "give the data, and the options for it, that the catalogue was made with (--min_item_interactions, --positive)"
    )
    catalogue = processor.catalogue
    assert catalogue is not None
    try:
        unknown = catalogue.rows(data.item_ids, unknown="mask") < 0
    except TypeError as error:
        raise ValueError(f"{option}: {error} in the data; {cure}") from error
    if unknown.any():
        raise ValueError(
            f"{option}: {int(unknown.sum())} of {len(data.item_ids)} items of the data are not in its catalogue of {len(catalogue)} "
            f"items, e.g. {data.item_ids[unknown][:3].tolist()}; {cure}"
        )


def new_model(args: ModelArguments, processor: OneRecProcessor, session_length: int) -> OneRecForConditionalGeneration:
    """
    A fresh generator for the processor's catalogue.

    Raises:
        ValueError: sizes that do not fit together, or an attention implementation that there is not.
    """
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration

    assert processor.catalogue is not None
    config = args.config(processor.catalogue.codebook_sizes, session_length, len(processor.catalogue))
    model = OneRecForConditionalGeneration._from_config(config, attn_implementation=args.attn_implementation)
    model.set_catalogue(processor.catalogue)
    return model


def baseline_rankings(
    data: PreparedData, catalogue: ItemCatalogue, split: str, k: int, exclude_seen: bool = True
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Catalogue rows that popularity and item-kNN rank for a split's histories, and the target rows, (users, items) padded with -1. They
    choose from the whole catalogue, as the model does.
    """
    from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline

    examples = getattr(data.split, split)
    histories = [catalogue.rows(history) for history in examples["history"]]
    sessions = [catalogue.rows(session) for session in examples["session"]]
    relevant = np.full((len(sessions), max(map(len, sessions))), -1)
    for row, session in zip(relevant, sessions, strict=True):
        row[: len(session)] = session
    train = np.split(catalogue.rows(data.split.train_sequences.item_ids), data.split.train_sequences.offsets[1:-1])
    rankings = {}
    for name, baseline in (("popularity", PopularityBaseline()), ("item_knn", ItemKNNBaseline())):
        rankings[name] = baseline.fit(train, len(catalogue)).recommend(histories, k, exclude_seen)
    return rankings, relevant


def table(rows: list[list[str]], header: list[str]) -> str:
    """Aligned plain text; the first column to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
