"""The k largest of each row: `torch.topk` with a rule for ties, in two stages where rows are long."""

import torch
import torch.nn.functional as F

_BLOCK = 64


def top_candidates(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k largest of each row, best first, ties in the order of their positions: `torch.topk` with a rule for ties.

    Args:
        scores: (rows, n) floats, -inf where there is no candidate.

    Returns:
        (rows, min(k, n)) values and int64 positions.

    Example:
        >>> top_candidates(torch.tensor([[1.0, 3.0, 1.0, 3.0]]), k=3)
        (tensor([[3., 3., 1.]]), tensor([[1, 3, 0]]))
    """
    rows, n = scores.shape
    if n <= k:
        values, places = scores.sort(dim=1, descending=True, stable=True)
        return values, places
    if n > 16 * k * _BLOCK:
        # The k best are in the k blocks with the best maxima: for any other block, k blocks hold a better value (or an equal one before it).
        blocks = F.pad(scores, (0, -n % _BLOCK), value=float("-inf")).view(rows, -1, _BLOCK)
        _, chosen = top_candidates(blocks.amax(2), k)
        chosen = chosen.sort(dim=1).values  # in order of positions, for the ties
        values, inside = top_candidates(blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).view(rows, -1), k)
        return values, chosen.gather(1, inside // _BLOCK) * _BLOCK + inside % _BLOCK
    threshold = scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    better, tied = scores > threshold, scores == threshold
    wanted = better | (tied & (tied.cumsum(1) <= k - better.sum(1, keepdim=True)))
    # Their number is known: an accelerator need not tell it to the host.
    places = wanted.nonzero_static(size=rows * k)[:, 1].view(rows, k)
    values, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


__all__ = ["top_candidates"]
