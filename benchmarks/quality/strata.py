"""
Which users a model ranks well: NDCG@10 by how often the target occurs in training and by whether training has it directly after the item before it,
and the difference to another model user by user. Reads the rankings that benchmarks/quality/run.py --keep saved; means over the files of a model.

    python benchmarks/quality/strata.py --row kept/onerec-[012]-test.npz --against kept/sasrec_text-[012]-test.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/strata.py`

from benchmarks.harness import dataset_options, finish, one_thread, parser, train_options
from benchmarks.quality.runs import parsed

COUNTS = {"10 times or fewer": (0, 10), "11 to 30": (11, 30), "31 and more": (31, 10**9)}


def last_rows(data, split: str, column: str) -> np.ndarray:
    """(users,) index of each user's last item in this column."""
    examples = getattr(data, split).with_format(None)
    return np.searchsorted(data.item_ids, [items[-1] for items in examples[column]])


def strata(data, split: str) -> dict[str, np.ndarray]:
    """(users,) masks by the users' targets."""
    rows = data.train_rows()
    counts = np.bincount(np.concatenate(rows), minlength=len(data.item_ids))
    followed = {pair for row in rows for pair in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)}
    before, target = (last_rows(data, split, column) for column in ("history", "session"))
    seen = np.array([pair in followed for pair in zip(before.tolist(), target.tolist(), strict=True)])
    of = counts[target]
    by_count = {name: (of >= low) & (of <= high) for name, (low, high) in COUNTS.items()}
    return {"all": np.ones_like(seen), **by_count, "pair in training": seen, "pair not in training": ~seen}


def per_user(files: list[str], target: np.ndarray) -> dict[str, np.ndarray]:
    """(users,) recall@10 and NDCG@10, means over files."""
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k

    ranked, relevant = [np.load(file)["rows"] for file in files], target[:, None]
    metrics = {"recall@10": recall_at_k, "ndcg@10": ndcg_at_k}
    return {
        name: np.mean([np.asarray(metric(rows, relevant, 10, per_row=True)) for rows in ranked], axis=0)
        for name, metric in metrics.items()
    }


def main() -> None:
    arguments = parser(__doc__)
    dataset_options(arguments)
    arguments.add_argument("--row", nargs="+", metavar="NPZ", help="rankings of a model; with --quick of popularity")
    arguments.add_argument("--against", nargs="+", default=[], metavar="NPZ", help="rankings of another model")
    options = arguments.parse_args()
    if not options.row and not options.quick:
        arguments.error("pass the rankings of a model: --row FILES, from benchmarks/quality/run.py --keep")
    one_thread()
    from onerec_hf.evaluation.results import result_row
    from onerec_hf.workflows import load_in_memory

    data = load_in_memory(parsed(train_options(options), {})[0])
    split = options.row[0].removesuffix(".npz").rsplit("-", 1)[1] if options.row else "test"
    target, users, rows = last_rows(data, split, "session"), strata(data, split), []
    files = {"model": options.row, "other": options.against}
    measured = {name: per_user(some, target) for name, some in files.items() if some}
    measured = measured or {"model": popularity(data, split, target)}
    for name, share in users.items():
        rows.append(result_row(f"{name}/users", share.mean(), "share"))
        for model, metrics in measured.items():
            rows.append(result_row(f"{name}/{model}/ndcg@10", metrics["ndcg@10"][share].mean(), "share"))
    if "other" in measured:
        for metric, values in measured["model"].items():
            more = values - measured["other"][metric]
            rows.append(result_row(f"difference/{metric}", more.mean(), "share", against="other"))
            rows.append(result_row(f"difference/{metric}/standard_error", more.std() / len(more) ** 0.5, "share"))
    finish(rows, options.json, split=split, files=files, protocol=data.split.description)


def popularity(data, split: str, target: np.ndarray) -> dict[str, np.ndarray]:
    """[`per_user`] of the popularity baseline, which needs no saved rankings."""
    from onerec_hf.baselines import PopularityBaseline
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k

    model = PopularityBaseline()
    model.fit(data.train_rows(), len(data.item_ids))
    examples = getattr(data, split).with_format(None)
    histories = [np.searchsorted(data.item_ids, items) for items in examples["history"]]
    ranked = model.recommend(histories, 10, True)
    metrics = {"recall@10": recall_at_k, "ndcg@10": ndcg_at_k}
    return {name: np.asarray(metric(ranked, target[:, None], 10, per_row=True)) for name, metric in metrics.items()}


if __name__ == "__main__":
    main()
