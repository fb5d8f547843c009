"""
What the rankings say that quality.py --keep wrote, means over the files of a row: NDCG@10 by how often the target was bought in training and by whether
training has seen it follow the item before it, and the difference to another row, user by user.

    python benchmarks/quality/strata.py --data_dir ../shared/data/amazon_beauty --row kept/onerec_items_dropout-[012]-test.npz \\
        --against kept/sasrec_ce-[012]-test.npz
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.harness import one_thread
from benchmarks.quality.runs import parsed

COUNTS = {"10 times or fewer": (0, 10), "11 to 30": (11, 30), "31 and more": (31, 10**9)}


def last_rows(data, split: str, column: str) -> np.ndarray:
    """(users,) positions in `data.item_ids` of each user's last item in this column."""
    examples = getattr(data.split, split).with_format(None)
    return np.searchsorted(data.item_ids, [items[-1] for items in examples[column]])


def strata(data, split: str) -> dict[str, np.ndarray]:
    """Which users belong to each, by their targets."""
    rows = data.train_rows()
    counts = np.bincount(np.concatenate(rows), minlength=len(data.item_ids))
    followed = {pair for row in rows for pair in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)}
    before, target = (last_rows(data, split, column) for column in ("history", "session"))
    seen = np.array([pair in followed for pair in zip(before.tolist(), target.tolist(), strict=True)])
    of = counts[target]
    by_count = {name: (of >= low) & (of <= high) for name, (low, high) in COUNTS.items()}
    return {"all": np.ones_like(seen), **by_count, "seen to follow": seen, "not seen": ~seen}


def found(files: list[str], target: np.ndarray) -> dict[str, np.ndarray]:
    """(users,) recall@10 and NDCG@10, means over files."""
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k

    ranked, relevant = [np.load(file)["rows"] for file in files], target[:, None]
    metrics = {"recall@10": recall_at_k, "ndcg@10": ndcg_at_k}
    return {
        name: np.mean([np.asarray(metric(rows, relevant, 10, per_row=True)) for rows in ranked], axis=0)
        for name, metric in metrics.items()
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data_dir", required=True)
    options.add_argument("--dataset", default="amazon-beauty")
    options.add_argument("--row", nargs="+", required=True, metavar="NPZ")
    options.add_argument("--against", nargs="+", default=[], metavar="NPZ")
    asked = options.parse_args()
    from onerec_hf.workflows import load_in_memory

    data = load_in_memory(
        parsed(["--dataset", asked.dataset, "--data_dir", asked.data_dir, "--output_dir", "-"], {})[0]
    )
    split = asked.row[0].removesuffix(".npz").rsplit("-", 1)[1]
    target, users = last_rows(data, split, "session"), strata(data, split)
    rows = [found(files, target) for files in (asked.row, asked.against) if files]
    for name, share in users.items():
        print(f"{name:18s} {share.mean():6.1%}", *(f"{row['ndcg@10'][share].mean():.4f}" for row in rows), sep="  ")
    for metric in rows[0] if asked.against else ():
        more = rows[0][metric] - rows[1][metric]
        print(f"{metric}: {more.mean():+.4f}, standard error {more.std() / len(more) ** 0.5:.4f}")


if __name__ == "__main__":
    one_thread()
    main()
