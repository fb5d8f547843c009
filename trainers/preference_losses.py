"""
Preference losses in addition to those of TRL's DPO. Most are combinations of TRL's losses; only S-DPO is implemented here.

With d_w = log pi(y_w|x) - log ref(y_w|x) of the chosen answer, d_l of the rejected one, `x = beta * (d_w - d_l)` and s(x) = -log sigmoid(x):

| loss | `loss_type` | implementation in TRL 1.16 |
|---|---|---|
| DPO, arXiv 2305.18290 | `"sigmoid"` | s(x) |
| IPO, arXiv 2310.12036 | `"ipo"` | TRL's: (mean-token d_w - mean-token d_l - 1 / (2 beta))^2 |
| rDPO, arXiv 2403.00409 | `"robust"` | TRL's: ((1 - e) s(x) - e s(-x)) / (1 - 2e), e = `label_smoothing` |
| cDPO, Mitchell 2023 | `"cdpo"` | [`cdpo_settings`]: a sum of "sigmoid" and "robust" |
| CPO, arXiv 2401.08417 | `"cpo"` | [`cpo_settings`]: "sigmoid" + "sft" against a reference of 0 |
| SimPO, arXiv 2405.14734 | `"simpo"` | "sigmoid_norm" against the reference of [`simpo_reference`] |
| S-DPO, arXiv 2406.09215 | `"s_dpo"` | [`s_dpo_loss`]; rows with several rejected answers |
"""

from __future__ import annotations

import torch

REFERENCE_FREE = ("cpo", "simpo")


def cdpo_settings(label_smoothing: float) -> dict[str, float]:
    """
    Conservative DPO, `(1 - e) s(x) + e s(-x)`, if a share e of the preferences is flipped (Mitchell, "A note on DPO with noisy
    preferences", 2023), as weights of TRL's losses. With robust(x) = ((1 - e) s(x) - e s(-x)) / (1 - 2e) it is
    `2 (1 - e) s(x) - (1 - 2e) robust(x)`.

    Args:
        label_smoothing: e, in [0, 0.5).

    Returns:
        `{loss_type: weight}`.

    Raises:
        ValueError: e outside [0, 0.5).

    Example:
        >>> cdpo_settings(0.25)
        {'sigmoid': 1.5, 'robust': -0.5}
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"cdpo needs label_smoothing in [0, 0.5), the share of flipped pairs; got {label_smoothing}")
    return {"sigmoid": 2 * (1 - label_smoothing), "robust": -(1 - 2 * label_smoothing)}


def cpo_settings(alpha: float = 1.0) -> dict[str, float]:
    """
    Contrastive preference optimization (arXiv 2401.08417), `s(beta (log pi(y_w) - log pi(y_l))) + alpha * NLL(y_w)`, as weights
    of TRL's losses. The reference's log-probabilities must be 0. The NLL is TRL's "sft", the mean over the tokens of the chosen rows.

    Args:
        alpha: weight of the chosen answer's likelihood.

    Returns:
        `{loss_type: weight}`.

    Example:
        >>> cpo_settings(0.5)
        {'sigmoid': 1.0, 'sft': 0.5}
    """
    return {"sigmoid": 1.0, "sft": alpha}


def simpo_reference(completion_mask: torch.Tensor, beta: float, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    SimPO (arXiv 2405.14734), `s(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)`, is TRL's "sigmoid_norm" with
    constant reference terms: `log ref(y_w) = |y_w| gamma / beta` and `log ref(y_l) = 0`.

    Args:
        completion_mask: (2B, T), chosen rows first.
        beta: scale of the rewards.
        gamma: target margin between them.

    Returns:
        chosen and rejected "reference log-probabilities", float32 (B,).

    Example:
        >>> mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> simpo_reference(mask, beta=2.0, gamma=1.0)
        (tensor([1.]), tensor([0.]))
    """
    lengths = completion_mask.sum(1).float().chunk(2)[0]
    return lengths * (gamma / beta), torch.zeros_like(lengths)


def s_dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """
    S-DPO (arXiv 2406.09215): DPO with several rejected answers,
    `-log sigmoid(-log sum_n exp(beta (d_l[n] - d_w)))`. With one rejected answer it equals DPO.

    Args:
        chosen: (B,) log-ratios d_w of policy and reference, summed over tokens.
        rejected: (B, N) log-ratios d_l of the rejected answers.
        beta: scale, as in DPO.

    Returns:
        (B,) losses.

    Example:
        >>> s_dpo_loss(torch.tensor([0.0]), torch.tensor([[0.0, 0.0, 0.0]]), beta=0.1)  # log 4: one of four
        tensor([1.3863])
    """
    return -torch.nn.functional.logsigmoid(-torch.logsumexp(beta * (rejected - chosen.unsqueeze(1)), dim=1))
