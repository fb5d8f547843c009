"""The session-wise next-token loss (OneRec paper, equation 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def session_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tokens_per_item: int,
    code_tokens: torch.Tensor | float,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Cross-entropy of sessions' code tokens: their sum over the number of code tokens.

    Args:
        logits: (rows, t, vocabulary).
        labels: (rows, t) code tokens in place, not shifted; -100 where nothing is predicted.
        tokens_per_item: an item's separator and codes; item i of a session stands at `i * tokens_per_item`.
        code_tokens: how many the batch has, in all of its parts.
        weights: of a session's items, first to last, relative to their mean; items beyond them weigh as the last. All alike when
            None, as in the paper.
        label_smoothing: share of a label's probability that goes to all tokens of the vocabulary alike.

    Example:
        >>> logits, labels = torch.zeros(1, 5, 8), torch.tensor([[4, 5, -100, 6, 7]])  # a b BOS a b: uniform guesses among 8 ...
        >>> logits[0, 3:, 6] = 2.0  # ... but for the second item
        >>> [round(session_loss(logits, labels, 3, 4, weights).item(), 2) for weights in (None, (3, 1), (0, 1))]
        [1.87, 1.98, 1.67]
    """
    reduction = "sum" if weights is None else "none"
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing, reduction=reduction
    )
    if weights is not None:
        places = torch.arange(labels.shape[1], device=labels.device) // tokens_per_item
        relative = torch.tensor([weight * len(weights) / sum(weights) for weight in weights], device=labels.device)
        losses = (losses.view_as(labels) * relative[places.clamp(max=len(weights) - 1)]).sum()
    return losses / code_tokens
