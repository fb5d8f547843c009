"""What several commands do: read data, embed and encode items, make a model, rank with baselines."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onerec_hf.cli.arguments import DataArguments, ModelArguments, SemanticIDArguments
    from onerec_hf.data import LeaveOneOutSplit, RecommendationData, UserSequences
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.semantic_ids import SemanticIDs


def say(text: str) -> None:
    """Progress goes to stderr: stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


def claim_folder(folder: str | os.PathLike, overwrite: bool) -> Path:
    """
    The output folder, made if need be.

    Raises:
        FileExistsError: it holds something already and `overwrite` was not given.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the output")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists already and is not empty; name another folder, or pass --overwrite to replace its results"
            )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # an earlier run's must not be taken for this one's
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class PreparedData:
    """Interactions that became sequences and examples, and which items they are about."""

    source: RecommendationData
    sequences: UserSequences
    split: LeaveOneOutSplit
    item_ids: np.ndarray

    def train_rows(self) -> list[np.ndarray]:
        """Training sequences as positions in `item_ids`."""
        flat = np.searchsorted(self.item_ids, self.split.train_sequences.item_ids)
        return np.split(flat, self.split.train_sequences.offsets[1:-1])


def prepare_data(args: DataArguments) -> PreparedData:
    """Reads the source, keeps positive feedback and frequent enough items, splits leave-one-out."""
    from onerec_hf.data import PositiveFeedback, UserSequences, leave_one_out, load_files, load_source

    if (args.dataset is None) == (args.interactions is None):
        raise ValueError("give either --dataset (a named source) or --interactions (your own table)")
    if args.dataset is not None:
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
    sequences = sequences.k_core(min_user=1, min_item=args.min_item_interactions)
    split = leave_one_out(
        sequences, session_length=args.session_length, max_history=args.max_history, stride=args.stride
    )
    item_ids = sequences.item_counts()[0]
    say(
        f"{source.name}: {len(source.interactions):,} interactions, positive: {positive}; "
        f"{len(sequences.item_ids):,} of {len(sequences):,} users on {len(item_ids):,} items kept. {split.description}"
    )
    return PreparedData(source, sequences, split, item_ids)


def embed_items(data: PreparedData, args: SemanticIDArguments) -> tuple[np.ndarray, str]:
    """(items, d) float32 embeddings in the order of `data.item_ids` and a line that says how they were made. Learns from training rows only."""
    from onerec_hf.semantic_ids import behaviour_embeddings, combine_embeddings, text_embeddings

    items = data.source.items.select(data.item_ids) if data.source.items is not None else None
    kinds = args.embedding
    if kinds == "auto":
        if items is None:
            kinds = "behaviour"
        else:
            kinds = "given+behaviour" if items.embeddings is not None else "text+behaviour"
    parts, weights = [], []
    for kind in kinds.split("+"):
        if kind == "behaviour":
            parts.append(behaviour_embeddings(data.train_rows(), len(data.item_ids), dim=args.embedding_dim))
            weights.append(args.behaviour_weight)
        elif kind == "text" and items is not None:
            parts.append(text_embeddings(items.frame["text"].tolist(), dim=args.embedding_dim))
            weights.append(1.0)
        elif kind == "given" and items is not None and items.embeddings is not None:
            parts.append(np.asarray(items.embeddings, dtype=np.float32))
            weights.append(1.0)
        else:
            raise ValueError(
                f"--embedding {args.embedding}: {kind!r} is not to be had; give text or embeddings with --items (and --embeddings), or use "
                "behaviour"
            )
    recipe = f"{kinds} (dim {args.embedding_dim}, behaviour weight {args.behaviour_weight:g})"
    return combine_embeddings(parts, weights), recipe


def fit_catalogue(data: PreparedData, args: SemanticIDArguments) -> SemanticIDs:
    """Semantic IDs for the items of `data`, with their training popularity."""
    from onerec_hf.semantic_ids import fit_semantic_ids

    embeddings, recipe = embed_items(data, args)
    popularity = np.bincount(np.concatenate(data.train_rows()), minlength=len(data.item_ids))
    say(f"semantic IDs: {len(data.item_ids):,} items from {recipe}, codebooks {args.codebook_sizes}")
    fitted = fit_semantic_ids(
        data.item_ids,
        embeddings,
        args.codebook_sizes,
        popularity=popularity,
        recipe=recipe,
        max_iter=args.kmeans_iterations,
        seed=args.semantic_id_seed,
    )
    say(fitted.report.table())
    return fitted


def check_catalogue(processor: OneRecProcessor, data: PreparedData) -> None:
    """
    Checks that the processor knows every item of the data.

    Raises:
        ValueError: it does not (how many items, the first three).
    """
    if processor.catalogue is None:
        raise ValueError(
            "this folder holds no item catalogue; name one that `onerec-hf semantic-ids fit` or `train` wrote"
        )
    unknown = processor.catalogue.rows(data.item_ids, unknown="mask") < 0
    if unknown.any():
        raise ValueError(
            f"{int(unknown.sum())} of {len(data.item_ids)} items of the data are not in the model's catalogue, e.g. "
            f"{data.item_ids[unknown][:3].tolist()}: give the data options that it was made with (--min_item_interactions, --positive)"
        )


def new_model(args: ModelArguments, processor: OneRecProcessor, session_length: int) -> OneRecForConditionalGeneration:
    """A fresh generator for the processor's catalogue."""
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration

    config = args.config(processor.catalogue.codebook_sizes, session_length)
    model = OneRecForConditionalGeneration._from_config(config, attn_implementation=args.attn_implementation)
    model.set_catalogue(processor.catalogue)
    return model


def baseline_rankings(data: PreparedData, split: str, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ranked rows of popularity and item-kNN for a split's histories (seen items left out), and the target rows, (users, items) padded with -1."""
    from onerec_hf.evaluation import ItemKNNBaseline, PopularityBaseline

    examples = getattr(data.split, split)
    histories = [np.searchsorted(data.item_ids, history) for history in examples["history"]]
    sessions = [np.searchsorted(data.item_ids, session) for session in examples["session"]]
    relevant = np.full((len(sessions), max(map(len, sessions))), -1)
    for row, session in zip(relevant, sessions, strict=True):
        row[: len(session)] = session
    rankings = {}
    for name, baseline in (("popularity", PopularityBaseline()), ("item_knn", ItemKNNBaseline())):
        rankings[name] = baseline.fit(data.train_rows(), len(data.item_ids)).recommend(histories, k)
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
