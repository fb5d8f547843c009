"""What leaving out the items of histories does to held-out users: who has no candidates, and whose target cannot be found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.modeling.files import listed

if TYPE_CHECKING:
    import datasets

# Share of users with a target in their own history, from which it is said.
_WORTH_SAYING = 0.01


@dataclass(frozen=True, eq=False)
class SeenItems:
    """
    Held-out users whose seen items are not ranked.

    Args:
        user_ids: (U,) of the users; their rows where the table has no ids.
        unranked: (U,) bool, users whose history holds every item: they have no candidates.
        hidden: (U,) bool, users with a target in their own history: no model finds it.

    Example:
        >>> print(SeenItems(np.array(["u1", "whale"]), np.array([False, True]), np.array([False, True])))
        1 of 2 users cannot be ranked, since their histories hold every item ('whale'): they are left out of the metrics. To rank seen items too, pass --eval_exclude_seen false (training) or --no_exclude_seen (evaluate).
    """

    user_ids: np.ndarray
    unranked: np.ndarray
    hidden: np.ndarray

    def about_unranked(self) -> str:
        """The sentence about users without candidates; empty where there are none."""
        if not (count := int(self.unranked.sum())):
            return ""
        return (
            f"{count:,} of {len(self.user_ids):,} users cannot be ranked, since their histories hold every item "
            f"({listed(list(map(repr, self.user_ids[self.unranked].tolist())))}): they are left out of the metrics."
        )

    def __str__(self) -> str:
        users, unranked = len(self.user_ids), int(self.unranked.sum())
        hidden, sentences = int((self.hidden & ~self.unranked).sum()), []
        if unranked:
            sentences.append(self.about_unranked())
        if hidden > _WORTH_SAYING * users:
            sentences.append(
                f"{hidden:,} of {users:,} users have a target that repeats an item of their history: seen items are not ranked, so that it "
                "cannot be found."
            )
        if not sentences:
            return ""
        sentences.append(
            "To rank seen items too, pass --eval_exclude_seen false (training) or --no_exclude_seen (evaluate)."
        )
        return " ".join(sentences)


def seen_items(examples: datasets.Dataset, items: Any, active: np.ndarray | None = None) -> SeenItems:
    """
    Counts held-out users whose candidates or targets are left out as seen.

    Args:
        examples: with the columns `history` and `session` (item ids) and, for names, `user_id`.
        items: the ranked items, with `indices` ([`~onerec_hf.ItemCatalogue`]).
        active: (items,) bool, those that are ranked; all of them when not given.

    Example:
        >>> from datasets import Dataset
        >>> from onerec_hf import ItemCatalogue
        >>> items = ItemCatalogue([7, 8], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> rows = [{"user_id": "a", "history": [7], "session": [8]}, {"user_id": "b", "history": [7, 8], "session": [7]}]
        >>> found = seen_items(Dataset.from_list(rows), items)
        >>> found.unranked.tolist(), found.hidden.tolist()
        ([False, True], [False, True])
    """
    table: Any = examples.with_format("arrow")[:]  # an Arrow table
    keys = {}
    for column in ("history", "session"):
        lists = table[column].combine_chunks()
        owners = np.repeat(np.arange(len(examples)), lists.value_lengths().to_numpy(zero_copy_only=False))
        rows = items.indices(lists.flatten().to_numpy(zero_copy_only=False), unknown="mask")
        ranked = rows >= 0 if active is None else (rows >= 0) & active[rows]
        if column == "history" and "history_positive" in table.column_names:  # the others may be recommended
            ranked &= table["history_positive"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        keys[column] = np.unique(owners[ranked] * len(items) + rows[ranked])
    seen = np.bincount(keys["history"] // len(items), minlength=len(examples))
    repeated = keys["session"][np.isin(keys["session"], keys["history"], assume_unique=True)]
    hidden = np.bincount(repeated // len(items), minlength=len(examples)) > 0
    named = "user_id" in examples.column_names
    user_ids = np.asarray(examples["user_id"][:] if named else range(len(examples)))
    return SeenItems(user_ids, seen >= (len(items) if active is None else int(active.sum())), hidden)
