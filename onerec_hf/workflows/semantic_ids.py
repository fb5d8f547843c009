"""Semantic IDs for the items of a dataset: embeddings from text and behaviour, a fit into a folder, quantizers compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from onerec_hf.workflows.artefact import save_processor, write_origin
from onerec_hf.workflows.dataset import RecommendationDataset
from onerec_hf.workflows.distributed import all_ranks, say, wait
from onerec_hf.workflows.loading import as_dataset
from onerec_hf.workflows.run_folder import begin, check_folder, finish, is_unfinished
from onerec_hf.workflows.settings import DataSettings, ModelOutputSettings, SemanticIDSettings, gather

if TYPE_CHECKING:
    from onerec_hf.semantic_ids import SemanticIDReport, SemanticIDs


@dataclass
class FitSettings(ModelOutputSettings):
    """Output folder of the semantic IDs."""

    output_dir: str = field(
        default="semantic-ids", metadata={"help": "Folder for processor, catalogue, codebooks and report."}
    )


def fit_semantic_ids(
    data: RecommendationDataset | DataSettings, *settings: object, command: str | None = None, **options
) -> SemanticIDs:
    """
    Fits semantic IDs for the items of a dataset and saves them as a folder that `train(semantic_ids=FOLDER)` takes: processor with
    catalogue, codebooks, report.

    Args:
        data: a dataset, or the settings to load one.
        settings: [`SemanticIDSettings`] and [`FitSettings`], each optional.
        command: the command line, for messages after a kill.
        options: single fields of these settings; `output_dir` where no [`FitSettings`] are given.

    Raises:
        ValueError: options that do not fit the data; FileExistsError: the folder is not empty and `overwrite` is not set.

    Example:
        >>> fitted = fit_semantic_ids(dataset, output_dir="runs/ids", codebook_sizes=[64, 64, 64])  # doctest: +SKIP
        >>> print(fitted.report.table())  # doctest: +SKIP
    """
    ids, output = gather((SemanticIDSettings, FitSettings), settings, options)
    if ids.semantic_ids is not None:
        raise ValueError("--semantic_ids is for `onerec-hf train`: fit makes new ones, into --output_dir")
    folder = check_folder(output.output_dir, output.overwrite or is_unfinished(output.output_dir))
    dataset = as_dataset(data)
    fitted = fit_catalogue(dataset, ids)

    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    begin(folder, command)
    write_origin(folder, fitted)
    # The catalogue is written last: without it no model is trained from this folder.
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=dataset.max_history)
    save_processor(processor, folder, dataset.items if output.save_items else None)
    finish(folder)
    wait()
    return fitted


def compare_quantizers(
    data: RecommendationDataset | DataSettings,
    settings: SemanticIDSettings | None = None,
    quantizers: Sequence[str] = ("balanced", "kmeans", "rq-vae"),
) -> list[SemanticIDReport]:
    """
    One report per quantizer, on the same embeddings. Where a prefix holds more items than the last level has codes, collisions are
    resolved by an extra digit.

    Raises:
        ValueError: an unknown quantizer, or options that do not fit the data.
    """
    from onerec_hf.semantic_ids import CrowdedPrefixError
    from onerec_hf.semantic_ids.quantizer import METHODS

    if unknown := [name for name in quantizers if name not in METHODS]:
        raise ValueError(f"--quantizers {unknown[0]}: choose among {', '.join(METHODS)}")
    settings, dataset = settings or SemanticIDSettings(), as_dataset(data)
    embedded, reports = embed_items(dataset, settings), []
    for name in quantizers:
        one = replace(settings, quantizer=name)
        try:
            fitted = fit_catalogue(dataset, one, embedded)
        except CrowdedPrefixError as error:
            say(f"{name}: {error}. Its collisions are resolved by an extra digit here.")
            fitted = fit_catalogue(dataset, replace(one, on_collision="extra-digit"), embedded)
        reports.append(fitted.report)
    return reports


def embed_items(
    data: RecommendationDataset, settings: SemanticIDSettings, rows: slice = slice(None)
) -> tuple[np.ndarray, str]:
    """
    (items, d) float32 embeddings in the order of `data.item_ids`, and a description of their sources. Behaviour is learned from
    training sequences only.

    Args:
        rows: the items to return. Given embeddings alone are read for these items only.
    """
    from onerec_hf.semantic_ids import (
        align_embeddings,
        behaviour_embeddings,
        combine_embeddings,
        cooccurring_pairs,
        text_embeddings,
    )

    kinds = settings.embedding
    read = rows if kinds == "given" else slice(None)
    items = data.items.select(data.item_ids[read]) if data.items is not None else None
    if kinds == "auto":
        if items is None:
            kinds = "behaviour"
        else:
            kinds = "given+behaviour" if items.embeddings is not None else "text+behaviour"
    parts, weights = [], []
    dim = settings.embedding_dim
    given = None if items is None or items.embeddings is None else np.asarray(items.embeddings, dtype=np.float32)
    text = None if items is None else lambda: text_embeddings(items.frame["text"].tolist(), dim=dim)
    for kind in kinds.split("+"):
        if kind == "behaviour":
            parts.append(behaviour_embeddings(data.train_rows(), len(data.item_ids), dim=dim))
            weights.append(settings.behaviour_weight)
        elif kind == "text" and text is not None:
            parts.append(text())
            weights.append(1.0)
        elif kind == "given" and given is not None:
            parts.append(given)
            weights.append(1.0)
        elif kind == "aligned" and text is not None:
            pairs = cooccurring_pairs(data.train_rows(), len(data.item_ids))
            parts.append(align_embeddings(text() if given is None else given, pairs, seed=settings.semantic_id_seed))
            weights.append(1.0)
        else:
            raise ValueError(
                f"--embedding {settings.embedding}: {kind!r} is not available; pass text or embeddings with --items (and --embeddings), or "
                "use behaviour"
            )
    recipe = f"{kinds} (dim {dim}, behaviour weight {settings.behaviour_weight:g})"
    vectors = combine_embeddings(parts, weights)
    return (vectors if kinds == "given" else vectors[rows]), recipe


def fit_catalogue(
    data: RecommendationDataset, settings: SemanticIDSettings, embedded: tuple[np.ndarray, str] | None = None
) -> SemanticIDs:
    """
    Semantic IDs for the items of `data`, with their training popularity; under torchrun the ranks share the items.

    Args:
        embedded: the result of `embed_items`, where it is known already.
    """
    from onerec_hf.semantic_ids import fit_semantic_ids

    if min(settings.codebook_sizes) < 1:
        raise ValueError(f"--codebook_sizes must hold positive numbers, one per level; got {settings.codebook_sizes}")
    ranks = all_ranks()
    mine = slice(None) if ranks is None else ranks.share(len(data.item_ids))
    embeddings, recipe = embed_items(data, settings, mine) if embedded is None else embedded
    popularity = np.bincount(np.concatenate(data.train_rows()), minlength=len(data.item_ids))
    say(f"semantic IDs: {len(data.item_ids):,} items from {recipe}, codebooks {settings.codebook_sizes}")
    return fit_semantic_ids(
        data.item_ids[mine],
        embeddings,
        settings.codebook_sizes,
        popularity=popularity[mine],
        recipe=recipe,
        method=settings.quantizer,
        on_collision=settings.on_collision,  # pyright: ignore[reportArgumentType] (checked there)
        max_iter=settings.kmeans_iterations,
        seed=settings.semantic_id_seed,
        ranks=ranks,
    )
