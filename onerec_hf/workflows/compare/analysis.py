"""What the held-out rankings of a comparison say: paired differences with their standard errors, and quality by strata of users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onerec_hf.workflows.compare.ranking import METRIC, per_user, targets
from onerec_hf.workflows.dataset import InMemoryDataset


@dataclass(frozen=True, eq=False)
class Quality:
    """
    Test metrics of one family.

    Args:
        seeds: per metric the value of each seed.
        users: per metric (users,) values, means over seeds.
    """

    seeds: dict[str, list[float]]
    users: dict[str, np.ndarray]

    @classmethod
    def of(cls, rankings: Sequence[np.ndarray], examples: Any, data: InMemoryDataset) -> Quality:
        """From the item indices that each seed ranked."""
        found = [per_user(ranked, examples, data) for ranked in rankings]
        return cls(
            {name: [float(one[name].mean()) for one in found] for name in found[0]},
            {name: np.mean([one[name] for one in found], axis=0) for name in found[0]},
        )

    def mean(self, metric: str) -> float:
        return float(self.users[metric].mean())


def strata(data: InMemoryDataset) -> dict[str, dict[str, np.ndarray]]:
    """
    (users,) masks of test users by name, in groups: popularity of the target, cold targets, length of the history, repeated targets, repeats in the
    history. Bounds are thirds of the users where the data decide them; empty strata are left out, and groups of one stratum.
    """
    from onerec_hf.data import positive_histories

    examples, rows = data.test, data.train_rows()
    histories = [np.searchsorted(data.item_ids, history) for history in positive_histories(examples)]
    target = targets(examples, data)
    counts = np.bincount(np.concatenate(rows), minlength=len(data.item_ids))[target]
    length = np.array([len(history) for history in histories])
    again = np.array([item in history for item, history in zip(target, histories, strict=True)])
    share = np.array([1 - len(np.unique(history)) / len(history) for history in histories])
    groups = {
        "times the target occurs in training": thirds(counts),
        "cold targets": {
            "never in training": counts == 0,
            "1 to 5 times": (counts >= 1) & (counts <= 5),
            "more often": counts > 5,
        },
        "items in the history": thirds(length),
        "repeated targets": {"target in the history": again, "target new to the user": ~again},
        "repeats in the history": {
            "none": share == 0,
            "up to a fifth": (share > 0) & (share <= 0.2),
            "more": share > 0.2,
        },
    }
    filled = {group: {name: mask for name, mask in masks.items() if mask.any()} for group, masks in groups.items()}
    return {group: masks for group, masks in filled.items() if len(masks) > 1}


def thirds(values: np.ndarray) -> dict[str, np.ndarray]:
    """
    Masks of three groups of about equal size by value; fewer where values are few.

    Example:
        >>> list(thirds(np.array([1, 1, 2, 3, 9, 12])))
        ['up to 1', '2 to 3', '4 and more']
    """
    low, high = (int(np.sort(values)[len(values) * third // 3 - (len(values) > 2)]) for third in (1, 2))
    bounds = [bound for bound in dict.fromkeys((low, high)) if bound < values.max()]
    found, start = {}, None
    for bound in bounds:
        name = f"up to {bound:,}" if start is None else f"{start:,} to {bound:,}" if start < bound else f"{bound:,}"
        found[name] = (values <= bound) & (values >= (0 if start is None else start))
        start = bound + 1
    found["all" if start is None else f"{start:,} and more"] = values >= (0 if start is None else start)
    return found


def share_of_repeats(examples: Any) -> float:
    """The share of held-out targets that the user's history holds already."""
    from onerec_hf.data import positive_histories

    pairs = zip(positive_histories(examples), examples["session"], strict=True)
    return float(np.mean([session[0] in set(history) for history, session in pairs]))


def by_strata(qualities: dict[str, Quality], data: InMemoryDataset, metric: str = METRIC) -> list[dict[str, Any]]:
    """A dictionary per stratum: `group`, `name`, `users`, and per family the mean and its standard error (`None` of a single user)."""
    found = []
    for group, masks in strata(data).items():
        for name, mask in masks.items():
            values = {}
            for family, quality in qualities.items():
                some = quality.users[metric][mask]
                error = float(some.std(ddof=1) / len(some) ** 0.5) if len(some) > 1 else None
                values[family] = {"mean": float(some.mean()), "error": error}
            found.append({"group": group, "name": name, "users": int(mask.sum()), "values": values})
    return found
