"""
Packed training: several histories in one encoder row, several sessions that read parts of it.

Masks are made by transformers' mask builders from the functions below, so that eager, sdpa and flex attention each get their own form.
"""

from collections.abc import Callable

import torch

# What can express these masks. Flash attention takes sequence lengths only: it cannot say that a session reads a part of a history.
PACKING_ATTENTION = ("sdpa", "eager", "flex_attention")

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def check_packing(
    implementation: str | None,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    history_ranges: torch.Tensor | None,
) -> None:
    """
    Raises:
        ValueError: the attention implementation cannot express packed rows, or arguments that contradict each other.
    """
    if segment_ids is None and history_ranges is None:
        return
    if implementation not in PACKING_ATTENTION:
        raise ValueError(
            f"segment_ids and history_ranges need an attention that takes any mask: {', '.join(PACKING_ATTENTION)}; this model has "
            f'{implementation!r}. Call model.set_attn_implementation("sdpa"), or train without packing and prefixes'
        )
    if history_ranges is None:
        raise ValueError("segment_ids without history_ranges: say which tokens of the packed rows each session reads")
    if segment_ids is not None and attention_mask is not None:
        raise ValueError("give segment_ids, which are 0 on padding, or attention_mask; not both")


def segment_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """
    (rows, t) int64: the index of each token inside its segment, a run of equal ids.

    Example:
        >>> segment_positions(torch.tensor([[1, 1, 1, 2, 2, 0]]))
        tensor([[0, 1, 2, 0, 1, 0]])
    """
    at = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    opens = torch.ones_like(segment_ids, dtype=torch.bool)
    opens[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return at - torch.where(opens, at, 0).cummax(-1).values


def same_segment(segment_ids: torch.Tensor) -> MaskFunction:
    """Tokens see tokens of their own segment; padding, segment 0, sees padding, so that no row of the softmax is empty."""

    def visible(batch, head, query, key):
        return segment_ids[batch, query] == segment_ids[batch, key]

    return visible


def within_ranges(history_ranges: torch.Tensor, steps: int) -> MaskFunction:
    """Query `p * steps + i` of row b, step i of its p-th session, sees the keys from `history_ranges[b, p, 0]` up to `[b, p, 1]`."""
    # Tensors of their own, not two views of one: flex attention's CPU kernel does not compile with views.
    starts, stops = (history_ranges[..., i].repeat_interleave(steps, dim=1).contiguous() for i in (0, 1))

    def visible(batch, head, query, key):
        return (starts[batch, query] <= key) & (key < stops[batch, query])

    return visible


def positions_behind(history_ranges: torch.Tensor, key_positions: torch.Tensor, steps: int) -> torch.Tensor:
    """
    (rows, P * steps) int64: for every query of `within_ranges` the position right behind the last token that it reads.

    Example:
        >>> keys = segment_positions(torch.tensor([[1, 1, 1, 2, 2, 0]]))
        >>> positions_behind(torch.tensor([[[0, 2], [3, 5]]]), keys, steps=2)
        tensor([[2, 2, 2, 2]])
    """
    last = history_ranges[..., 1] - 1
    return (key_positions.expand(len(last), -1).gather(1, last) + 1).repeat_interleave(steps, dim=1)
