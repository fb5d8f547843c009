"""Evidence of the item head: counts of item pairs from training rows only, and the weights from validation users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from onerec_hf.workflows.artefact import catalogue_of
from onerec_hf.workflows.dataset import RecommendationDataset, sample
from onerec_hf.workflows.distributed import say

if TYPE_CHECKING:
    import datasets
    import torch

    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder

#: Validation users that fit the weights; more change nothing.
MOST_USERS = 5000
#: Largest width of content vectors: with 384 the evidence of Amazon Beauty is no better.
CONTENT_DIM = 128


def fit_evidence(
    model: OneRecForConditionalGeneration,
    processor: OneRecProcessor,
    data: RecommendationDataset,
    seed: int = 0,
    exclude_seen: bool = True,
    weights_of: OneRecForConditionalGeneration | None = None,
) -> dict[str, float] | None:
    """
    Fills the evidence of a trained model's item head: neighbour lists from the training sequences, weights from the validation users (without any, the
    default weights). What is asked for lately counts where the data has times and it predicts validation users better. The model's other weights do
    not change.

    Args:
        seed: of the sample of validation users where there are more than 5,000.
        exclude_seen: as in the evaluation: items of the history are no candidates.
        weights_of: take the weights of this model, where the validation users are part of the training.

    Returns:
        The weights by name; None for a model without evidence.

    Example:
        >>> fit_evidence(result.model, result.processor, dataset)  # doctest: +SKIP
        {'head': 1.1, 'near': 0.4, 'next': 0.3, 'before': 0.2, 'content': 1.5, 'content_last': 1.0, 'popular': 0.1, 'recent': 0.3, 'trending': 0.2}
    """
    import torch

    from onerec_hf.data.evidence_counts import count_evidence, event_log, fit_evidence_weights
    from onerec_hf.data.windows import request_times
    from onerec_hf.modeling.item_evidence import DEFAULT_WEIGHTS

    head = item_head(model)
    if head is None or head.evidence is None:
        return None
    catalogue = catalogue_of(processor)
    sequences = data.train_sequences
    rows = rows_of_items(model, catalogue.indices(sequences.item_ids))
    count_evidence(head.evidence, (rows - 1, sequences.offsets))
    fitted = None if weights_of is None else item_head(weights_of).evidence
    timed = sequences.timed if fitted is None else fitted.recent > 0
    log = event_log(rows - 1, sequences.times) if timed else None
    if fitted is not None:
        head.evidence.set_log(*(log or ()))
        head.evidence.set_weights(fitted.weights)
    else:
        head.evidence.set_log()
        # The default weights choose the candidates, in a second fit as in the first.
        head.evidence.set_weights(torch.tensor(DEFAULT_WEIGHTS))
        users = sample(data.validation, MOST_USERS, seed)
        found = candidate_features(model, processor, users, exclude_seen)
        fit_evidence_weights(head.evidence, *found, log=log, times=request_times(users))
    head.config.recent = head.evidence.recent
    weights: dict[str, float] = dict(zip(head.evidence.names, head.evidence.weights.tolist(), strict=True))
    counted = [name for name in weights if head.content is not None or not name.startswith("content")]
    say("evidence weights: " + ", ".join(f"{name} {weights[name]:.2f}" for name in counted))
    return weights


def about_lately(model: OneRecForConditionalGeneration) -> str:
    """What the protocol says of evidence that knows when a request is made, behind the other sentences."""
    head = item_head(model)
    if head is None or head.evidence is None or not head.evidence.recent:
        return ""
    return (
        " The model's evidence counts what all users had in training rows before each held-out request, so it knows the request's time: a served model "
        "knows as much while new rows are counted into it (onerec-hf update)."
    )


def item_head(model: OneRecForConditionalGeneration) -> Any:
    """The model's [`ItemHead`], or None."""
    return model.get_encoder().item_head


def rows_of_items(model: OneRecForConditionalGeneration, indices: np.ndarray) -> np.ndarray:
    """Rows of the item head of item indices of the model's catalogue; 0 for items without a row."""
    import torch

    assert model.catalogue is not None
    of_items = item_head(model).rows_of(torch.tensor(model.catalogue.codes, dtype=torch.long)).cpu().numpy()
    return of_items[indices]


def candidate_features(
    model: OneRecForConditionalGeneration,
    processor: OneRecProcessor,
    examples: datasets.Dataset,
    exclude_seen: bool = True,
    batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of held-out users: features and rows of candidates ([`ItemEvidence.features`]), and the rows of their first target."""
    import torch

    from onerec_hf.data import OneRecDataCollator
    from onerec_hf.modeling.feature_codes import BESIDE_HISTORIES
    from onerec_hf.modeling.feature_embedding import positive_places
    from onerec_hf.modeling.item_head import history_states
    from onerec_hf.modeling.layers_onerec import at_places

    encoder, collator = model.get_encoder(), OneRecDataCollator(processor, with_seen=exclude_seen)
    head, levels = item_head(model), len(catalogue_of(processor).codebook_sizes)
    head_rows = torch.from_numpy(rows_of_items(model, np.arange(len(catalogue_of(processor))))).to(model.device)
    training = model.training
    model.eval()
    parts: list[tuple[Any, Any, Any]] = []
    with torch.no_grad():
        vectors = head.output_vectors(encoder.embed_tokens)
        for start in range(0, len(examples), batch_size):
            some = examples.select(range(start, min(start + batch_size, len(examples))))
            batch = {key: value.to(model.device) for key, value in collator(some.to_list()).items()}
            mask = at_places(batch["attention_mask"], model.config.encoder_stride)
            features = batch.get("feature_ids")
            states = encoder(
                batch["input_ids"],
                batch["attention_mask"],
                **{name: batch.get(name) for name in BESIDE_HISTORIES},
            ).last_hidden_state
            scores = (history_states(states, mask) @ vectors.T).float()
            excluded = None
            if exclude_seen:
                seen = batch["exclude"]
                excluded = torch.where(seen < 0, 0, head_rows[seen.clamp(min=0)])
            history = head.history_rows(batch["input_ids"]) * positive_places(model.config.features, features)
            features, rows = head.evidence.features(scores, history, head.content, excluded)
            parts.append((features, rows, head.rows(batch["labels"][:, :levels])))
    model.train(training)
    if not parts:
        empty = torch.zeros(0, 1, 7)
        return empty, empty[..., 0].long(), empty[:, 0, 0].long()
    features, rows, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, rows, targets


class Content(NamedTuple):
    """(items, d) content vectors of length 1, and what makes those of new items."""

    vectors: np.ndarray
    encoder: ItemEncoder


def content_of_catalogue(data: RecommendationDataset, processor: OneRecProcessor) -> Content | None:
    """Content vectors in the order of the catalogue, zeros for items that the data does not hold; None where the data has no content."""
    found = content_vectors(data, CONTENT_DIM)
    if found is None:
        say("the items have neither text nor embeddings: the item head has no content vectors")
        return None
    catalogue = catalogue_of(processor)
    content = np.zeros((len(catalogue), found.vectors.shape[1]), dtype=np.float32)
    content[catalogue.indices(data.item_ids)] = found.vectors
    return found._replace(vectors=content)


def content_vectors(data: RecommendationDataset, dim: int) -> Content | None:
    """
    Content vectors in the order of `data.item_ids`: given embeddings, else text embeddings; None without either. More than `dim` dimensions are
    reduced by a singular value decomposition, which keeps inner products as well as that many dimensions can.

    Args:
        dim: the largest width.
    """
    from onerec_hf.semantic_ids.embeddings import TextEncoder
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder

    if data.items is None:
        return None
    items, axes = data.items.select(data.item_ids), None
    if items.embeddings is None:
        vectors, of_texts = TextEncoder.fit(items.frame["text"].tolist(), dim)
        return Content(vectors, ItemEncoder([("text", vectors.shape[1], 1.0)], of_texts))
    vectors = _normalised(np.asarray(items.embeddings, dtype=np.float32))
    if vectors.shape[1] > dim:
        _, axes = np.linalg.eigh(vectors.T @ vectors)
        axes = axes[:, : -dim - 1 : -1]
        vectors = _normalised(vectors @ axes)
    return Content(vectors, ItemEncoder([("given", vectors.shape[1], 1.0)], axes=axes))


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
