"""Histories as sequence models read them: item indices, and where the data has features their codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onerec_hf.baselines.next_items import pad_codes, pad_left
from onerec_hf.data.windows import request_times
from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS, interaction_codes, user_codes

if TYPE_CHECKING:
    from onerec_hf.baselines.item_index import ItemIndex
    from onerec_hf.modeling.features import FeatureSchema


@dataclass(frozen=True, eq=False)
class ReadHistories:
    """
    The histories of users.

    Args:
        items: per user item indices, oldest first.
        codes: per user (items, slots) codes of the user and of each interaction; None without features.
        positive: per user (items,) bool; None where all interactions are positive.
        times: (users,) int64, when their requests were made; None for now.

    Example:
        >>> read = ReadHistories([np.array([4, 2])], [np.array([[3, 5], [3, 6]])], [np.array([True, False])])
        >>> {name: ids.tolist() for name, ids in read.inputs(2).items()}
        {'input_ids': [[5, 3]], 'feature_ids': [[[3, 5], [3, 6]]], 'positive_ids': [[5]]}
    """

    items: Sequence[np.ndarray]
    codes: Sequence[np.ndarray] | None = None
    positive: Sequence[np.ndarray] | None = None
    times: np.ndarray | None = None

    @classmethod
    def of_examples(cls, examples: Any, index: ItemIndex, schema: FeatureSchema | None) -> ReadHistories:
        """
        Histories of examples: a dataset, or the columns of some of its rows by name.

        Args:
            index: ids of the items.
            schema: the features that the model reads, of the columns `user_features` and `history_features`; without any such column the values are
                missing.

        Raises:
            ValueError: one of the columns is missing, or codes of another schema.
        """
        names = getattr(examples, "column_names", None) or list(examples)
        items = [index.indices(history) for history in examples["history"]]
        positive = None
        if "history_positive" in names:
            positive = [np.asarray(flags, dtype=bool) for flags in examples["history_positive"]]
        columns = {name: examples[name] for name in FEATURE_COLUMNS if name in names}
        if schema is None or not columns:
            return cls(items, None, positive, request_times(examples))
        for name, features in zip(FEATURE_COLUMNS, (schema.user, schema.interaction), strict=True):
            if features and name not in columns:
                raise ValueError(
                    f"examples lack the column {name!r} that the model's features need (found: {', '.join(names)})"
                )
        lengths = np.array([len(history) for history in items])
        of_users = user_codes(schema, len(items), codes=columns.get("user_features"))
        entries = interaction_codes(schema, lengths, codes=columns.get("history_features"))
        codes = np.concatenate([np.repeat(of_users, lengths, axis=0), entries], axis=1)
        return cls(items, np.split(codes, np.cumsum(lengths)[:-1]), positive, request_times(examples))

    def __getitem__(self, rows: slice) -> ReadHistories:
        parts: tuple[Any, ...] = (self.items, self.codes, self.positive, self.times)
        cut: Any = [None if part is None else part[rows] for part in parts]
        return ReadHistories(*cut)

    @property
    def seen(self) -> Sequence[np.ndarray]:
        """Per user the indices of positive interactions, which rankings leave out."""
        if self.positive is None:
            return self.items
        return [items[flags] for items, flags in zip(self.items, self.positive, strict=True)]

    def inputs(self, longest: int | None = None) -> dict[str, torch.Tensor]:
        """
        `input_ids`, with features `feature_ids`, and where some interactions are not positive `positive_ids`, padded on the left; with times
        `request_times`.
        """
        found = {"input_ids": pad_left(self.items, longest)}
        if self.codes is not None:
            found["feature_ids"] = pad_codes(self.codes, found["input_ids"].shape[1])
        if self.positive is not None:
            # Of the items that are read, as a request for them has no others.
            read = zip(self.items, self.positive, strict=True)
            latest = slice(None) if longest is None else slice(-longest, None)
            found["positive_ids"] = pad_left([items[latest][flags[latest]] for items, flags in read])
        if self.times is not None:
            found["request_times"] = torch.from_numpy(self.times)
        return found


def of_places(user: np.ndarray, history: np.ndarray) -> np.ndarray:
    """
    (items, slots) codes of a user's places.

    Args:
        user: (user slots,) codes.
        history: (items, interaction slots) codes.

    Example:
        >>> of_places(np.array([3]), np.array([[4, 5], [6, 7]])).tolist()
        [[3, 4, 5], [3, 6, 7]]
    """
    return np.concatenate([np.tile(user, (len(history), 1)), history], axis=1).astype(np.int32)
