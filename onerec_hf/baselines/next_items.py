"""Training examples of sequence models: every item of a sequence but the first is a target once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

IGNORED = -100


def pieces(sequence: np.ndarray, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Cuts a sequence into inputs and targets of at most `longest` items; every item but the first is a target once. Beyond `longest`, a target
    has at least `longest / 2` items before it: the prefixes of [`~onerec_hf.data.prefix_examples`].

    Args:
        sequence: item indices, at least two.
        longest: at least 1.

    Returns:
        pairs of inputs and targets, -1 where there is no target.

    Example:
        >>> [(inputs.tolist(), targets.tolist()) for inputs, targets in pieces(np.arange(6), 4)]
        [([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4], [-1, -1, 5])]
    """
    step, found = max(1, longest // 2), []
    for start in range(0, max(len(sequence) - 1 - longest, 0) + step, step):
        inputs, targets = sequence[:-1][start : start + longest], sequence[1:][start : start + longest].copy()
        if start:  # the others are targets of the piece before
            targets[: longest - step] = -1
        found.append((inputs, targets))
    return found


class NextItemDataset(Dataset):
    """
    Sequences cut into pieces, one a row.

    Args:
        sequences: per user the item indices in time order. Users with fewer than two items have no target and are left out.
        max_history: items of a piece; the model's.
        codes: per user (items, slots) codes of the user and of each interaction.
        positive: per user (items,) bool: the others are no targets.

    Raises:
        ValueError: no sequence has two items.

    Example:
        >>> dataset = NextItemDataset([np.array([0, 1, 2]), np.array([3])], max_history=50)
        >>> len(dataset), dataset[0]["targets"].tolist()
        (1, [1, 2])
    """

    def __init__(
        self,
        sequences: Iterable[np.ndarray],
        max_history: int,
        codes: Sequence[np.ndarray] | None = None,
        positive: Sequence[np.ndarray] | None = None,
    ):
        self._rows = []
        for user, sequence in enumerate(sequences):
            if len(sequence) < 2:
                continue
            sequence = np.asarray(sequence)
            known = sequence if positive is None else np.where(positive[user], sequence, -1)
            places = pieces(np.arange(len(sequence)), max_history)
            for inputs, targets in places:
                row = {"inputs": sequence[inputs], "targets": np.where(targets < 0, -1, known[targets])}
                if not (row["targets"] >= 0).any():
                    continue
                row["sequence"] = sequence if positive is None else sequence[positive[user]]
                self._rows.append(row if codes is None else row | {"codes": codes[user][inputs]})
        if not self._rows:
            raise ValueError("no training sequence has two items: there is no next item to train on")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self._rows[row]


class NextItemCollator:
    """
    Rows of a [`NextItemDataset`] to the inputs of [`SequentialRecommender`]: `input_ids` and `labels`, (rows, t), with codes `feature_ids`, padded on
    the left.

    Args:
        with_seen: also `seen_ids`, (rows, longest): all items of each row's user, which are never drawn as negatives.

    Example:
        >>> rows = [{"inputs": np.array([4, 2]), "targets": np.array([-1, 7])}, {"inputs": np.array([5]), "targets": np.array([0])}]
        >>> {name: ids.tolist() for name, ids in NextItemCollator()(rows).items()}
        {'input_ids': [[5, 3], [0, 6]], 'labels': [[-100, 8], [-100, 1]]}
    """

    def __init__(self, with_seen: bool = False):
        self.with_seen = with_seen

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        targets = pad_left([row["targets"] for row in rows])
        batch = {
            "input_ids": pad_left([row["inputs"] for row in rows]),
            "labels": targets.masked_fill(targets == 0, IGNORED),
        }
        if self.with_seen:
            batch["seen_ids"] = pad_left([row["sequence"] for row in rows])
        if "codes" in rows[0]:
            batch["feature_ids"] = pad_codes([row["codes"] for row in rows], batch["input_ids"].shape[1])
        return batch


def pad_left(rows: Sequence[np.ndarray], longest: int | None = None) -> torch.Tensor:
    """
    Item indices to input ids, (rows, t) int64: padded with 0 on the left, cut to the latest `longest`.

    Example:
        >>> pad_left([np.array([4, 2, 9]), np.array([5])], longest=2).tolist()
        [[3, 10], [0, 6]]
    """
    width = max(1, max(map(len, rows), default=0))
    width = width if longest is None else min(width, longest)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, items in zip(ids, rows, strict=True):
        latest = np.asarray(items)[-width:] + 1
        row[width - len(latest) :] = latest
    return torch.from_numpy(ids)


def pad_codes(rows: Sequence[np.ndarray], width: int) -> torch.Tensor:
    """
    (rows, width, slots) int64 codes, padded with 0 on the left, cut to the latest `width`.

    Example:
        >>> pad_codes([np.array([[3, 4], [3, 5]]), np.array([[6, 7]])], width=2).tolist()
        [[[3, 4], [3, 5]], [[0, 0], [6, 7]]]
    """
    codes = np.zeros((len(rows), width, rows[0].shape[1] if len(rows) else 0), dtype=np.int64)
    for row, some in zip(codes, rows, strict=True):
        latest = some[-width:]
        row[width - len(latest) :] = latest
    return torch.from_numpy(codes)


def draw_negatives(seen_ids: torch.Tensor, rows: torch.Tensor, num_items: int) -> torch.Tensor:
    """
    One random item for each target, none that its user has seen.

    Args:
        seen_ids: (users, s) input ids, padded with 0.
        rows: (targets,) the user of each target.
        num_items: size of the catalogue.

    Returns:
        (targets,) input ids.

    Raises:
        ValueError: a user has seen all items.

    Example:
        >>> draw_negatives(torch.tensor([[1, 3], [0, 2]]), torch.tensor([0, 0]), num_items=3).tolist()
        [2, 2]
    """
    if seen_ids.shape[1] >= num_items:
        ordered = F.pad(seen_ids, (1, 0)).sort(dim=1).values
        if ((ordered[:, 1:] > ordered[:, :-1]).sum(1) >= num_items).any():
            raise ValueError(f'loss="bce" draws unseen items, and a user has seen all {num_items}. Use loss="ce"')
    drawn = torch.randint(1, num_items + 1, rows.shape, device=rows.device)
    seen = seen_ids[rows]
    while (again := (drawn[:, None] == seen).any(1)).any():
        drawn[again] = torch.randint(1, num_items + 1, (int(again.sum()),), device=rows.device)
    return drawn
