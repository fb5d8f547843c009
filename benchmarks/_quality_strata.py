"""
Where rows of the contest are right: NDCG@10 on validation by how often the target was bought in training, and by whether training has seen it follow
the item before it. Reads the rankings that quality.py --keep wrote.

    python benchmarks/_quality_strata.py ../shared/data/amazon_beauty kept/sasrec_ce-0 kept/onerec_items_dropout-0
"""

from __future__ import annotations

import sys

import numpy as np
from _harness import one_thread
from _quality_runs import parsed

COUNTS = ((0, 10), (11, 30), (31, 10**9))


def strata(data) -> dict[str, np.ndarray]:
    """Which validation users belong to each."""
    rows = data.train_rows()
    counts = np.bincount(np.concatenate(rows), minlength=len(data.item_ids))
    followed = {pair for row in rows for pair in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)}
    before, target = (_last(data, column) for column in ("history", "session"))
    seen = np.array([pair in followed for pair in zip(before.tolist(), target.tolist(), strict=True)])
    of = counts[target]
    by_count = {
        f"{low} to {high} times" if high < 10**9 else f"{low} and more": (of >= low) & (of <= high)
        for low, high in COUNTS
    }
    return {"all": np.ones_like(seen), **by_count, "seen to follow": seen, "not seen": ~seen}


def _last(data, column: str) -> np.ndarray:
    """(users,) positions in `data.item_ids` of each validation user's last item in this column."""
    return np.searchsorted(data.item_ids, [items[-1] for items in data.split.validation.with_format(None)[column]])


def main(folder: str, files: list[str]) -> None:
    from onerec_hf.cli.steps import prepare_data

    data = prepare_data(parsed(["--dataset", "amazon-beauty", "--data_dir", folder, "--output_dir", "unused"], {})[0])
    users, target = strata(data), _last(data, "session")
    print(f"{'':40s}", *(f"{name} ({share.mean():.0%})" for name, share in users.items()), sep="  ")
    for file in files:
        right = np.load(f"{file}-validation.npz")["rows"][:, :10] == target[:, None]
        gain = (right / np.log2(np.arange(2, 12))).sum(1)
        print(f"{file:40s}", *(f"{gain[share].mean():.4f}" for share in users.values()), sep="  ")


if __name__ == "__main__":
    one_thread()
    main(sys.argv[1], sys.argv[2:])
