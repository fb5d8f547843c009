"""
The old probabilities that ECPO and GBPO put into the denominator of GRPO's ratio. All else of their objectives is TRL's GRPO.

With `sg` for a stopped gradient, the probability `pi` of a sample (or of one of its tokens) and its probability `pi_old` when it was drawn:

- ECPO (OneRec technical report, arXiv 2506.13695, section 4): `min(r A, clip(r, 1 - eps, 1 + eps) A)` with `r = pi / pi'_old`, and where A < 0
  `pi'_old = max(sg(pi) / (1 + eps + delta), pi_old)`: a ratio beyond `1 + eps + delta` is clipped before it multiplies the gradient, which stays alive.
- GBPO (OneRec-V2, arXiv 2508.20900): `r A` without a clip. `pi'_old = max(pi_old, sg(pi))` where A >= 0, `max(pi_old, 1 - sg(pi))` where A < 0, which
  bounds the gradient by that of binary cross-entropy.
"""

from __future__ import annotations

import math

import torch


def ecpo_old_logps(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, epsilon: float = 0.2, delta: float = 0.1
) -> torch.Tensor:
    """
    `log pi'_old` of ECPO.

    Args:
        logps, old_logps: (rows, t) log-probabilities, now and when the samples were drawn.
        advantages: (rows, 1) or (rows, t).

    Example:
        >>> now, old = torch.tensor([[0.8, 0.8]]).log(), torch.tensor([[0.1, 0.7]]).log()
        >>> ecpo_old_logps(now, old, torch.tensor([[-1.0]])).exp().round(decimals=3).tolist()  # 0.8 / 1.3
        [[0.6150000095367432, 0.699999988079071]]
        >>> ecpo_old_logps(now, old, torch.tensor([[1.0]])).exp().round(decimals=3).tolist()
        [[0.10000000149011612, 0.699999988079071]]
    """
    floor = logps.detach() - math.log(1 + epsilon + delta)
    return torch.where(advantages < 0, torch.maximum(floor, old_logps), old_logps)


def gbpo_old_logps(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """
    `log pi'_old` of GBPO; arguments as of [`ecpo_old_logps`].

    Example:
        >>> now, old = torch.tensor([[0.25, 0.25]]).log(), torch.tensor([[0.1, 0.9]]).log()
        >>> gbpo_old_logps(now, old, torch.tensor([[-1.0]])).exp().round(decimals=3).tolist()
        [[0.75, 0.8999999761581421]]
        >>> gbpo_old_logps(now, old, torch.tensor([[1.0]])).exp().round(decimals=3).tolist()
        [[0.25, 0.8999999761581421]]
    """
    now = logps.detach()
    # log(1 - pi), accurate at both ends.
    complement = torch.where(now > -math.log(2), torch.log(-torch.expm1(now)), torch.log1p(-now.exp()))
    return torch.maximum(old_logps, torch.where(advantages < 0, complement, now))
