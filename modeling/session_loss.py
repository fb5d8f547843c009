"""The session-wise next-token loss (arXiv 2502.18965, equation 4)."""

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
    The session-wise next-token loss (paper, equation 4): the cross-entropy of sessions' code tokens, divided by their number.

    Args:
        logits: (rows, t, vocabulary).
        labels: (rows, t) code tokens, not shifted; -100 where nothing is predicted.
        tokens_per_item: separator and codes; item i of a session begins at `i * tokens_per_item`.
        code_tokens: number of code tokens of the whole batch, over accumulation steps and ranks.
        weights: weights of a session's items, first to last, relative to their mean; the last one holds for later items. Equal when
            None, as in the paper.
        label_smoothing: share of a label's probability that is spread over the vocabulary.

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


__all__ = ["session_loss"]
