"""
How the sequence models are trained: on the next item of every place, by the cross-entropy over all items, which on public data beats the sampled
binary loss of SASRec's paper by far (arXiv 2309.07602), or by that one, for the row as it was published.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.quality._sequence_models import SequenceModel


def next_item_loss(
    model: SequenceModel,
    states: torch.Tensor,
    targets: torch.Tensor,
    loss: str,
    bought: torch.Tensor | None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Mean loss over places.

    Args:
        states: (places, width).
        targets: (places,) ids of the items that follow, from 1.
        loss: `ce`, the softmax over all items; `bce`, one random item beside each target (SASRec's equation 6).
        bought: (places, t) all ids of each place's user, from which `bce` draws no negative; `ce` needs none.
        label_smoothing: share of a target's probability that `ce` gives to all items alike.

    Raises:
        ValueError: labels to smooth with `bce`.
    """
    if loss == "bce" and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} needs loss=ce: bce has no labels to smooth")
    if loss == "ce":
        return F.cross_entropy(model.scores(states), targets - 1, label_smoothing=label_smoothing)
    items = len(model.items.weight)
    drawn = torch.randint(1, items, targets.shape, device=targets.device)
    while (again := (drawn[:, None] == bought).any(1)).any():
        drawn[again] = torch.randint(1, items, (int(again.sum()),), device=targets.device)
    right, wrong = ((states * model.embed(ids)).sum(-1) for ids in (targets, drawn))
    return -(F.logsigmoid(right) + F.logsigmoid(-wrong)).mean()


def pieces(sequence: np.ndarray, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Inputs and targets (item rows, -1 where nothing is learnt) of at most `longest` items, in which every item but the first is a target once.
    Beyond `longest` a target has at least `longest / 2` items before it: what prefix_examples gives to a generator.

    Args:
        sequence: two items at least.
        longest: 2 at least.

    Example:
        >>> [(inputs.tolist(), targets.tolist()) for inputs, targets in pieces(np.arange(6), 4)]
        [([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4], [-1, -1, 5])]
    """
    step, found = longest // 2, []
    for start in range(0, max(len(sequence) - 1 - longest, 0) + step, step):
        inputs, targets = sequence[:-1][start : start + longest], sequence[1:][start : start + longest].copy()
        if start:  # the piece before has learnt these
            targets[: longest - step] = -1
        found.append((inputs, targets))
    return found


def cosine(share: float, least: float = 0.0) -> float:
    """What is left of a learning rate when this share of a training is done: all of it at 0, `least` at 1, a cosine between them."""
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * share))


def learning_rate_factor(share: float, warmup: float = 0.02) -> float:
    """
    Warm-up, and [`cosine`] to nothing, which the generators have too.

    Args:
        share: of all steps that are done, 0 to 1.
        warmup: share of them in which the learning rate rises.

    Example:
        >>> [round(learning_rate_factor(share), 2) for share in (0.01, 0.02, 0.5, 1)]
        [0.5, 1.0, 0.5, 0.0]
    """
    return min(1.0, share / warmup) * cosine(share)


def train_sequence_model(
    model: SequenceModel,
    sequences: Sequence[np.ndarray],
    seed: int,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    loss: str = "ce",
    label_smoothing: float = 0.0,
    share: float = 1.0,
    schedule: str = "constant",
    precision: str = "float32",
    judge: Callable[[SequenceModel], float] | None = None,
    patience: int = 5,
    spent: Callable[[], float] | None = None,
) -> float | None:
    """
    Trains on all next items of every sequence ([`pieces`]).

    Args:
        sequences: per user the item rows in time order, two at least.
        share: of the places of a batch, drawn anew each time: the scores of all items at all places are most of the work.
        schedule: `constant`, or `cosine` of the learning rate over the epochs or the budget, whichever ends first ([`learning_rate_factor`]).
        precision: of the products while training (autocast); `bfloat16` takes half the time on a CPU that has it.
        judge: after each epoch, how good the model is; training ends when that has not risen for `patience` epochs, and the best weights stay.
        spent: share of a budget that is spent; training ends where it reaches 1.

    Returns:
        What `judge` said of the weights that stayed.

    Raises:
        ValueError: another schedule or precision.
    """
    if schedule not in ("constant", "cosine") or precision not in ("float32", "bfloat16"):
        raise ValueError(f"schedule={schedule}, precision={precision}: constant or cosine, float32 or bfloat16")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    best, best_state, since = None, None, 0
    parts = [(*piece, sequence) for sequence in sequences for piece in pieces(sequence, model.max_length)]
    device, steps, done = model.items.weight.device, epochs * math.ceil(len(parts) / batch_size), 0
    for _ in range(epochs):
        model.train()
        order = rng.permutation(len(parts))
        for start in range(0, len(order), batch_size):
            read, follow, whole = zip(*(parts[i] for i in order[start : start + batch_size]), strict=True)
            inputs, targets = model.batch(read), model.batch(follow)
            real = (targets != 0) & torch.from_numpy(rng.random(targets.shape) < share).to(targets.device)
            bought = None
            if loss == "bce":
                ids = pad_sequence([torch.from_numpy(sequence + 1) for sequence in whole], batch_first=True)
                bought = ids.to(targets.device).repeat_interleave(real.sum(1), dim=0)
            done += 1
            if schedule == "cosine":
                part = done / steps if spent is None else min(1.0, max(done / steps, spent()))
                optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(part)
            with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
                value = next_item_loss(model, model(inputs)[real], targets[real], loss, bought, label_smoothing)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if spent is not None and spent() >= 1:
                break
        if judge is not None:
            now = judge(model)
            since += 1
            if best is None or now > best:
                best, best_state, since = now, copy.deepcopy(model.state_dict()), 0
        if since >= patience or (spent is not None and spent() >= 1):
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    return best
