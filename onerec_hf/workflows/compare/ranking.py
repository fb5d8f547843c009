"""Held-out users ranked by the artefact of any family, through the path of the server: quality per user, and the time of a request."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.artefact import recommender_of
from onerec_hf.workflows.dataset import InMemoryDataset

if TYPE_CHECKING:
    from onerec_hf.evaluation.held_out import SeenItems
    from onerec_hf.modeling.requests import Request

TOP_K = 10
METRIC = "ndcg@10"  # on validation users: chooses checkpoints, settings and the best family


def sample(data: InMemoryDataset, users: int) -> Any:
    """The same random validation users in every run, in their order."""
    rows = np.random.default_rng(0).permutation(len(data.validation))[:users]
    return data.validation.select(np.sort(rows))


def rankable(data: InMemoryDataset, exclude_seen: bool, users: int) -> tuple[InMemoryDataset, dict[str, SeenItems]]:
    """
    The dataset with a sample of its validation users (see [`sample`]), without those who have no candidates since their histories hold every item;
    and what is said of them by split.

    Args:
        exclude_seen: whether items of the history are not ranked.
        users: of the sample.

    Raises:
        ValueError: nobody is left.
    """
    from onerec_hf.baselines import ItemIndex
    from onerec_hf.evaluation.held_out import seen_items

    parts, found = {"validation": sample(data, users), "test": data.test}, {}
    if exclude_seen:
        for split, examples in parts.items():
            found[split] = seen_items(examples, ItemIndex(data.item_ids))
            parts[split] = examples.select(np.flatnonzero(~found[split].unranked))
            if not len(parts[split]):
                raise ValueError(
                    f"all {len(examples):,} {split} users have every item in their history, so that nothing is left to rank. Pass --no_exclude_seen"
                )
    return replace(data, split=replace(data.split, **parts)), found


def parameters(recommender: Any) -> int:
    """Trained weights."""
    return sum(weight.numel() for _, weight in recommender.weights())


def rankings(
    recommender: Any, examples: Any, item_ids: np.ndarray, exclude_seen: bool, batch: int = 256
) -> np.ndarray:
    """(users, TOP_K) item indices that requests with the users' histories get, best first, -1 where there are fewer."""
    ranked, requests = (
        np.full((len(examples), TOP_K), -1, dtype=np.int64),
        requests_of(recommender, examples, exclude_seen),
    )
    with recommender.held():
        for start in range(0, len(ranked), batch):
            for user, answer in enumerate(recommender.recommend(requests[start : start + batch]), start=start):
                items = [session[0] for session in answer.sessions]
                ranked[user, : len(items)] = np.searchsorted(item_ids, items)
    return ranked


def requests_of(recommender: Any, examples: Any, exclude_seen: bool) -> list[Request]:
    """Requests of held-out users, with the codes of their features for a model that reads them; for the others of positive interactions only."""
    from onerec_hf.data import positive_histories
    from onerec_hf.data.windows import REQUEST_TIME
    from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS
    from onerec_hf.modeling.requests import Request

    if recommender.schema is None:
        columns = {"history": positive_histories(examples)}
    else:
        names = [name for name in ("history", *FEATURE_COLUMNS) if name in examples.column_names]
        columns = {name: examples[name] for name in names}
    if REQUEST_TIME in examples.column_names:
        columns[REQUEST_TIME] = examples[REQUEST_TIME]
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [Request(**row, top_k=TOP_K, exclude_seen=exclude_seen) for row in rows]


def per_user(ranked: np.ndarray, examples: Any, data: InMemoryDataset) -> dict[str, np.ndarray]:
    """(users,) recall@10 and NDCG@10 of rankings, of all items of the held-out sessions."""
    from onerec_hf.baselines import ItemIndex
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k
    from onerec_hf.workflows.evaluation import item_indices

    relevant = item_indices(examples, ItemIndex(data.item_ids))[1]
    metrics = {"recall@10": recall_at_k, METRIC: ndcg_at_k}
    return {name: np.asarray(metric(ranked, relevant, TOP_K, per_row=True)) for name, metric in metrics.items()}


def targets(examples: Any, data: InMemoryDataset) -> np.ndarray:
    """(users,) index of each user's held-out item, of several the first."""
    return np.searchsorted(data.item_ids, [session[0] for session in examples["session"]])


def measure(folder: Path, data: InMemoryDataset, exclude_seen: bool, users: int) -> dict[str, Any]:
    """CPU milliseconds of a request with one history on one thread, through the path of the server, and the bytes of the artefact."""
    import torch

    rows = np.random.default_rng(0).permutation(len(data.test))[:users]
    recommender, seconds, threads = recommender_of(folder), [], torch.get_num_threads()
    # A server's requests are made now.
    asked = requests_of(recommender, data.test.select(rows), exclude_seen)
    requests = [replace(request, request_time=None) for request in asked]
    torch.set_num_threads(1)
    try:
        with recommender.held():
            for number, request in enumerate([requests[0], *requests]):
                began = time.process_time()  # of the processor: the machine may be shared
                recommender.recommend([request])
                seconds += [time.process_time() - began] if number else []  # the first one warms up
    finally:
        torch.set_num_threads(threads)
    median, most = np.quantile(seconds, [0.5, 0.95]) * 1000
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"ms": float(median), "ms_95": float(most), "bytes": size}
