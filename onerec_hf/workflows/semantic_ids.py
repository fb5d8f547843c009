"""Semantic IDs for the items of a dataset: embeddings from text and behaviour, a fit into a folder, quantizers compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onerec_hf.workflows.artefact import save_processor, write_origin
from onerec_hf.workflows.dataset import RecommendationDataset
from onerec_hf.workflows.distributed import all_ranks, say, wait
from onerec_hf.workflows.id_map import write_id_map
from onerec_hf.workflows.loading import as_dataset
from onerec_hf.workflows.run_folder import begin, check_folder, finish, is_unfinished, own_folder
from onerec_hf.workflows.settings import DataSettings, ModelOutputSettings, SemanticIDSettings, gather

if TYPE_CHECKING:
    from onerec_hf.semantic_ids import SemanticIDReport, SemanticIDs
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder


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
    with own_folder(output.output_dir):
        folder = check_folder(output.output_dir, output.overwrite or is_unfinished(output.output_dir))
        dataset = as_dataset(data)
        fitted = fit_catalogue(dataset, ids)

        from onerec_hf.modeling.items_file import saved_items
        from onerec_hf.modeling.processing_onerec import OneRecProcessor

        begin(folder, command)
        write_origin(folder, fitted)
        # The catalogue is written last: without it no model is trained from this folder.
        processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=dataset.max_history)
        save_processor(processor, folder, dataset.items if output.save_items else None)
        write_id_map(folder, fitted.catalogue, saved_items(folder, fitted.catalogue))
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


class EmbeddedItems(NamedTuple):
    """(items, d) float32 embeddings in the order of `data.item_ids`, a description of their sources, and what embeds new items alike."""

    vectors: np.ndarray
    recipe: str
    encoder: ItemEncoder


def embed_items(data: RecommendationDataset, settings: SemanticIDSettings, rows: slice = slice(None)) -> EmbeddedItems:
    """
    Embeddings of the items. Behaviour is learned, and the graph made, from training sequences only.

    Args:
        rows: the items to return. Given embeddings alone are read for these items only.

    Raises:
        ValueError: a source that is unknown or not in the data, or fewer than one layer of the graph.
    """
    from onerec_hf.semantic_ids import behaviour_embeddings, combine_embeddings, cooccurring_pairs
    from onerec_hf.semantic_ids.alignment import AlignmentMap
    from onerec_hf.semantic_ids.embeddings import TextEncoder, unit_rows
    from onerec_hf.semantic_ids.graph import graph_embeddings
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder

    kinds, smoothed = settings.embedding, "graph" in settings.embedding.split("+")
    if smoothed and settings.graph_layers < 1:
        raise ValueError(f"--graph_layers {settings.graph_layers}: pass at least 1, or leave graph out of --embedding")
    read = rows if kinds == "given" else slice(None)
    items = data.items.select(data.item_ids[read]) if data.items is not None else None
    if smoothed:
        kinds = "+".join(kind for kind in kinds.split("+") if kind != "graph") or "auto"
    if kinds == "auto":
        if items is None:
            kinds = "behaviour"
        else:
            kinds = "given+behaviour" if items.embeddings is not None else "text+behaviour"
    vectors, parts = [], []
    dim, encoder, alignment = settings.embedding_dim, None, None
    given = None if items is None or items.embeddings is None else np.asarray(items.embeddings, dtype=np.float32)
    texts = None if items is None else items.frame["text"].tolist()
    for kind in kinds.split("+"):
        weight, name = 1.0, kind
        if kind == "behaviour":
            vectors.append(behaviour_embeddings(data.train_rows(), len(data.item_ids), dim=dim))
            weight = settings.behaviour_weight
        elif kind == "text" and texts is not None:
            of_texts, encoder = TextEncoder.fit(texts, dim)
            vectors.append(of_texts)
        elif kind == "given" and given is not None:
            vectors.append(given)
        elif kind == "aligned" and texts is not None:
            pairs, content, name = cooccurring_pairs(data.train_rows(), len(data.item_ids)), given, "aligned given"
            if content is None:
                (content, encoder), name = TextEncoder.fit(texts, dim), "aligned text"
            alignment = AlignmentMap.fit(content, pairs, seed=settings.semantic_id_seed)
            vectors.append(alignment(content))
        else:
            raise ValueError(
                f"--embedding {settings.embedding}: {kind!r} is not available; pass text or embeddings with --items (and --embeddings), or "
                "use behaviour"
            )
        parts.append((name, vectors[-1].shape[1], weight))
    recipe = f"{kinds} (dim {dim}, behaviour weight {settings.behaviour_weight:g})"
    if smoothed:
        recipe = f"graph+{recipe[:-1]}, {settings.graph_layers} graph layer{'s' * (settings.graph_layers > 1)})"
        vectors = [graph_embeddings(unit_rows(part), data.train_rows(), settings.graph_layers) for part in vectors]
    combined = combine_embeddings(vectors, [weight for _, _, weight in parts])
    return EmbeddedItems(
        combined if settings.embedding == "given" else combined[rows], recipe, ItemEncoder(parts, encoder, alignment)
    )


def fit_catalogue(
    data: RecommendationDataset, settings: SemanticIDSettings, embedded: EmbeddedItems | None = None
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
    embeddings, recipe, encoder = embed_items(data, settings, mine) if embedded is None else embedded
    popularity = np.bincount(np.concatenate(data.train_rows()), minlength=len(data.item_ids))
    say(f"semantic IDs: {len(data.item_ids):,} items from {recipe}, codebooks {settings.codebook_sizes}")
    fitted = fit_semantic_ids(
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
    return replace(fitted, encoder=encoder)
