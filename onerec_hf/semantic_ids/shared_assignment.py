"""Who stays with a centroid when the points that ask for it lie on several ranks: thresholds from all-reduced counts, no point is sent."""

from __future__ import annotations

import torch

from onerec_hf.semantic_ids.process_group import Alone

# Regrets are non-negative float32, whose bits are ordered as they are.
_MOST_BITS, _BITS_AT_ONCE = 2**31 - 1, 4


def staying_of(
    ranks: Alone, choice: torch.Tensor, regret: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What [`~onerec_hf.semantic_ids.balanced_assignment.staying`] gives where the points of all ranks stand one after the other: (n,) bool for
    this rank's; and the (K,) room that is left then.

    Of each centroid the smallest regret that may stay is searched for, four bits at a time: the ranks add up how many of their points
    reach each of sixteen thresholds, 128 bytes a centroid. Where points of equal regret stand at the threshold, those of earlier ranks
    come first.

    Args:
        choice, regret: (n,), this rank's.
        room: (K,) int64, of all ranks.
    """
    every = torch.arange(len(room), device=room.device)
    worth = regret.view(torch.int32).long()
    keys = (choice << 32) + (_MOST_BITS - worth)  # by centroid, largest regret first
    keys, order = keys.sort(stable=True)
    first = torch.searchsorted(keys, every << 32)

    def reaching(thresholds: torch.Tensor) -> torch.Tensor:
        """(K, t) how many of this rank's points ask for a centroid with at least the regret whose bits are (K, t) `thresholds`."""
        last = (every[:, None] << 32) + (_MOST_BITS - thresholds)
        return torch.searchsorted(keys, last, right=True) - first[:, None]

    threshold = torch.zeros_like(room)
    for shift in range(32 - _BITS_AT_ONCE, -1, -_BITS_AT_ONCE):
        steps = threshold[:, None] + (torch.arange(2**_BITS_AT_ONCE, device=room.device) << shift)
        enough = ranks.sum(reaching(steps)) >= room[:, None]
        enough[:, 0] = True  # where fewer ask than there is room for, all stay
        threshold = steps.gather(1, enough.sum(1, keepdim=True) - 1).squeeze(1)
    counts = reaching(torch.stack([threshold + 1, threshold], dim=1))
    everyones = ranks.gather(torch.stack([counts[:, 0], counts[:, 1] - counts[:, 0]])[None])  # (ranks, 2, K)
    above, tied = everyones.sum(0)
    at_threshold = room - above
    earlier = everyones[: ranks.rank, 1].sum(0)
    allowed = counts[:, 0] + (at_threshold - earlier).clamp(min=0)
    stays = torch.empty_like(choice, dtype=torch.bool)
    asked = choice[order]
    # Behind those at the threshold stand the ones below it, who do not stay however much room a rank has.
    allowed = torch.minimum(allowed, counts[:, 1])
    stays[order] = torch.arange(len(asked), device=asked.device) - first[asked] < allowed[asked]
    return stays, room - above - torch.minimum(at_threshold, tied)
