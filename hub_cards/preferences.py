"""Card of a preference dataset drawn by `OneRecDPOTrainer` (`trainer.pairs`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.hub_cards.alignment import Alignment, pairs_per_iteration
from onerec_hf.hub_cards.common import names, write_card

if TYPE_CHECKING:
    from datasets import Dataset

_MEANINGS = {
    "row": "row of the training dataset",
    "iteration": "iteration of the alignment, from 0",
    "history": "item ids of the user's history, oldest first",
    "chosen": "item ids of the preferred session",
    "rejected": "item ids of the rejected session; several sessions for S-DPO",
    "chosen_reward": "reward of the chosen session",
    "rejected_reward": "reward of the rejected session (of the best one for S-DPO)",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_preferences_card(
    folder: str | os.PathLike,
    pairs: Dataset,
    alignment: Alignment | None = None,
    repo_id: str | None = None,
    *,
    catalogue_hash: str | None = None,
    data: str = "",
    command: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes `README.md` for a pair table to `folder`, which contains the table as Parquet.

    Args:
        pairs: rows with at least `history`, `chosen`, `rejected`; `trainer.pairs`, or those of several iterations.
        alignment: `Alignment.of(trainer)` (default: not recorded).
        repo_id: the Hub repository for the card's snippet (default: `folder`).
        catalogue_hash: hash of the sessions' catalogue.
        data: description of the histories' data.
        command, metadata: as for `write_generator_card`.

    Raises:
        ValueError: a table without rows.

    Example:
        >>> trainer.pairs.to_parquet("my-pairs/pairs.parquet")  # doctest: +SKIP
        >>> write_preferences_card("my-pairs", trainer.pairs, Alignment.of(trainer))  # doctest: +SKIP
    """
    from huggingface_hub import DatasetCardData

    if not len(pairs):
        raise ValueError("the pair table has no rows; pass a table with pairs")
    extra = dict(metadata or {})
    rewards = {
        side: float(np.mean(pairs[f"{side}_reward"]))
        for side in ("chosen", "rejected")
        if f"{side}_reward" in pairs.column_names
    }
    write_card(
        folder,
        "preferences",
        DatasetCardData(
            **{
                "tags": list(dict.fromkeys(["onerec", "preferences", "recommendation", *extra.pop("tags", ())])),
                "size_categories": next((name for bound, name in _SIZES if len(pairs) < bound), "1M<n<10M"),
                "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}],
                **extra,
            }
        ),
        **names(folder, repo_id),
        columns=[(name, _type(feature), _MEANINGS.get(name, "")) for name, feature in (pairs.features or {}).items()],
        pairs=len(pairs),
        histories=len({tuple(history) for history in pairs["history"]}),
        iterations=pairs_per_iteration(pairs) if "iteration" in pairs.column_names else {},
        rewards=rewards,
        lengths={side: _lengths(pairs[side]) for side in ("chosen", "rejected")},
        alignment=alignment,
        catalogue_hash=catalogue_hash,
        data=data,
        command=command,
    )


def _type(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    return f"list of {_type(inner)}" if inner is not None else str(getattr(feature, "dtype", feature))


def _lengths(sessions: Any) -> tuple[int, int]:
    """Minimum and maximum number of items per session."""
    flat = [one for row in sessions for one in (row if row and isinstance(row[0], list) else [row])]
    return min(map(len, flat)), max(map(len, flat))
