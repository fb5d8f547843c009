"""Held-out users ranked by the artefact of any family, through the path of the server: quality per user, and the time of a request."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from onerec_hf.workflows.artefact import recommender_of
from onerec_hf.workflows.dataset import InMemoryDataset

TOP_K = 10
METRIC = "ndcg@10"  # on validation users: chooses checkpoints, settings and the best family


def sample(data: InMemoryDataset, users: int) -> Any:
    """The same random validation users in every run, in their order."""
    rows = np.random.default_rng(0).permutation(len(data.validation))[:users]
    return data.validation.select(np.sort(rows))


def parameters(recommender: Any) -> int:
    """Trained weights."""
    return sum(weight.numel() for _, weight in recommender.weights())


def rankings(
    recommender: Any, examples: Any, item_ids: np.ndarray, exclude_seen: bool, batch: int = 256
) -> np.ndarray:
    """(users, TOP_K) item indices that requests with the users' histories get, best first, -1 where there are fewer."""
    from onerec_hf.modeling.requests import Request

    ranked, histories = np.full((len(examples), TOP_K), -1, dtype=np.int64), examples["history"]
    with recommender.held():
        for start in range(0, len(ranked), batch):
            requests = [
                Request(history, top_k=TOP_K, exclude_seen=exclude_seen)
                for history in histories[start : start + batch]
            ]
            for user, answer in enumerate(recommender.recommend(requests), start=start):
                items = [session[0] for session in answer.sessions]
                ranked[user, : len(items)] = np.searchsorted(item_ids, items)
    return ranked


def per_user(ranked: np.ndarray, examples: Any, data: InMemoryDataset) -> dict[str, np.ndarray]:
    """(users,) recall@10 and NDCG@10 of rankings."""
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k

    target = targets(examples, data)[:, None]
    metrics = {"recall@10": recall_at_k, METRIC: ndcg_at_k}
    return {name: np.asarray(metric(ranked, target, TOP_K, per_row=True)) for name, metric in metrics.items()}


def targets(examples: Any, data: InMemoryDataset) -> np.ndarray:
    """(users,) index of each user's held-out item."""
    return np.searchsorted(data.item_ids, [session[0] for session in examples["session"]])


def measure(folder: Path, data: InMemoryDataset, exclude_seen: bool, users: int) -> dict[str, Any]:
    """CPU milliseconds of a request with one history on one thread, through the path of the server, and the bytes of the artefact."""
    import torch

    from onerec_hf.modeling.requests import Request

    rows = np.random.default_rng(0).permutation(len(data.test))[:users]
    histories = data.test.select(rows)["history"]
    recommender, seconds, threads = recommender_of(folder), [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with recommender.held():
            for number, history in enumerate([histories[0], *histories]):
                began = time.process_time()  # of the processor: the machine may be shared
                recommender.recommend([Request(history, top_k=TOP_K, exclude_seen=exclude_seen)])
                seconds += [time.process_time() - began] if number else []  # the first one warms up
    finally:
        torch.set_num_threads(threads)
    median, most = np.quantile(seconds, [0.5, 0.95]) * 1000
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"ms": float(median), "ms_95": float(most), "bytes": size}
