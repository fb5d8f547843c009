"""
What aligning content embeddings with behaviour adds: content, behaviour, aligned content, and pairs of them. All come
from the training part only (every user's items but the last two).

recall@10: the held-out item among the ten nearest (cosine) to the user's last history item, the history left out.
first_code_agreement: the share of users whose last history item and held-out item have the same first code of `codebook_size`, balanced
k-means; first_code_chance: that share if held-out items were dealt to users at random.

    python benchmarks/speed/embeddings.py --data_dir ../shared/data/amazon_beauty --json benchmarks/results/embeddings.json
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/embeddings.py`

from benchmarks.harness import DATA, cpu_seconds, finish, parser, say

CODES = 256


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/amazon_beauty", help="folder of Amazon Beauty's files")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument(
        "--split", default="test", choices=("test", "validation"), help="validation to choose settings"
    )
    return options.parse_args()


def variants(content: np.ndarray, train: list[np.ndarray], seed: int, quick: bool) -> dict[str, np.ndarray]:
    """Name -> (N, d) embeddings."""
    from onerec_hf.semantic_ids.alignment import align_embeddings, cooccurring_pairs
    from onerec_hf.semantic_ids.embeddings import behaviour_embeddings, combine_embeddings

    behaviour = behaviour_embeddings(train, len(content), dim=128, window=5, seed=seed)
    pairs = cooccurring_pairs(train, len(content), window=5, seed=seed)
    started = cpu_seconds()
    aligned = align_embeddings(content, pairs, seed=seed, **({"steps": 30} if quick else {}))
    say(f"seed {seed}: aligned in {cpu_seconds() - started:.0f} CPU seconds")
    return {
        "content": content,
        "behaviour": behaviour,
        "aligned": aligned,
        "content+behaviour": combine_embeddings([content, behaviour]),
        "aligned+behaviour": combine_embeddings([aligned, behaviour]),
    }


def recall(vectors: np.ndarray, histories: list[np.ndarray], targets: np.ndarray, k: int = 10) -> float:
    """Share of users whose target is among the k items nearest to their last one, their history left out."""
    import torch

    table = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)), dim=1)
    hits = 0
    for start in range(0, len(histories), 1024):
        chunk = histories[start : start + 1024]
        scores = table[[history[-1] for history in chunk]] @ table.T
        rows = np.repeat(np.arange(len(chunk)), [len(history) for history in chunk])
        scores[rows, np.concatenate(chunk)] = -torch.inf
        wanted = torch.from_numpy(targets[start : start + 1024])[:, None]
        hits += int((scores.topk(k, dim=1).indices == wanted).any(1).sum())
    return hits / len(histories)


def first_code_agreement(
    vectors: np.ndarray, last: np.ndarray, targets: np.ndarray, seed: int, max_iter: int
) -> tuple[float, float]:
    """Agreement and chance. Levels do not look ahead: the first code is the same whatever levels follow."""
    from onerec_hf.semantic_ids import ResidualQuantizer

    codes = ResidualQuantizer([CODES], max_iter=max_iter, seed=seed).fit(vectors).codes_[:, 0].numpy()
    shares = [np.bincount(codes[items], minlength=CODES) / len(items) for items in (last, targets)]
    return float((codes[last] == codes[targets]).mean()), float(shares[0] @ shares[1])


def main() -> None:
    from onerec_hf.data import UserSequences, load_source
    from onerec_hf.evaluation.results import result_row

    options = arguments()
    data = load_source("amazon-beauty", options.data_dir)
    assert data.items is not None
    assert data.items.embeddings is not None
    content = np.asarray(data.items.embeddings, dtype=np.float32)
    row_of = {item: row for row, item in enumerate(data.items.item_ids.tolist())}
    sequences = [
        np.array([row_of[item] for item in items.tolist()])
        for items in UserSequences.from_interactions(data.interactions).lists()
    ]
    train = [items[:-2] for items in sequences]
    held_out = -1 if options.split == "test" else -2
    users = sequences[::15] if options.quick else sequences
    histories = [items[:held_out] for items in users]
    last, targets = (np.array([items[at] for items in users]) for at in (held_out - 1, held_out))

    measured: dict[str, list[float]] = {}
    seeds = options.seeds[:1] if options.quick else options.seeds
    for seed in seeds:
        for name, vectors in variants(content, train, seed, options.quick).items():
            measured.setdefault(f"{name}/recall@10", []).append(recall(vectors, histories, targets))
            agreement, chance = first_code_agreement(vectors, last, targets, seed, max_iter=4 if options.quick else 20)
            measured.setdefault(f"{name}/first_code_agreement", []).append(agreement)
            measured.setdefault(f"{name}/first_code_chance", []).append(chance)
            say(
                f"seed {seed}: {name} "
                + " ".join(f"{values[-1]:.4f}" for key, values in measured.items() if key.startswith(f"{name}/"))
            )
    rows = []
    for name, values in measured.items():
        variant, metric = name.split("/")
        against = None if variant == "content" or metric == "first_code_chance" else f"amazon-beauty/content/{metric}"
        spread = [min(values), max(values)]
        rows.append(
            result_row(f"amazon-beauty/{name}", statistics.mean(values), "share", against=against, spread=spread)
        )
    finish(
        rows,
        options.json,
        seeds=seeds,
        split=options.split,
        users=len(users),
        items=len(content),
        codebook_size=CODES,
        protocol="Embeddings from every user's items but the last two. recall@10: the held-out item among the ten items nearest (cosine) "
        "to the last history item, the user's history left out.",
    )


if __name__ == "__main__":
    main()
