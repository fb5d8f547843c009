"""
From a table of interactions to a trained, evaluated and saved OneRec model.

    python examples/train_on_your_table.py                                      # a synthetic table, a few seconds
    python examples/train_on_your_table.py --interactions ratings.csv --items films.csv

The interactions need `user_id`, `item_id` and `timestamp`; the items need `item_id` and text columns.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from onerec_hf.workflows import load_dataset, ranking_table, train


def synthetic_tables(users: int = 150, items: int = 60, views: int = 10) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Interactions and items: every user walks along a ring of films, one or two steps at a time."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 3, (users, views)).cumsum(1) + rng.integers(0, items, (users, 1))
    genres = ["crime", "comedy", "drama", "horror", "musical", "western"]
    interactions = {
        "user_id": np.repeat(np.arange(users), views),
        "item_id": [f"film{step % items}" for step in steps.flat],
        "timestamp": np.tile(np.arange(views), users),
    }
    films = {
        "item_id": [f"film{i}" for i in range(items)],
        "title": [f"a {genres[i * len(genres) // items]} number {i}" for i in range(items)],
    }
    return pd.DataFrame(interactions), pd.DataFrame(films)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", help=".csv, .tsv, .parquet or .jsonl; a synthetic table when not given")
    parser.add_argument("--items", help="the same formats; without items semantic IDs come from behaviour alone")
    parser.add_argument("--output_dir", default="runs/your-table")
    parser.add_argument("--max_steps", type=int, help="at most; chosen from the data by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    interactions, items = (args.interactions, args.items) if args.interactions else synthetic_tables()

    # Positive feedback in time order; the last item of each user is for the test, the one before it for validation.
    dataset = load_dataset(interactions=interactions, items=items, session_length=3)

    # Semantic IDs from text and behaviour, training, the ranking of the whole catalogue beside baselines, and one folder with it all.
    # Options are those of `onerec-hf train`; the others are chosen from the data and printed with their reasons.
    options = {} if args.max_steps is None else {"max_steps": args.max_steps}
    result = train(dataset, output_dir=args.output_dir, overwrite=True, seed=args.seed, disable_tqdm=True, **options)
    print(ranking_table(result.rows))
    metrics = result.metrics
    print(f"recall@10: {metrics['onerec/recall@10']:.3f} (popularity: {metrics['popularity/recall@10']:.3f})")

    # The folder loads like any other model: AutoProcessor.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).
    history = dataset.test[0]["history"]
    sessions = result.model.eval().recommend(**result.processor([history]), num_beams=20, exclude_seen=True)
    print(f"after {history[-3:]} comes the session {result.processor.decode(sessions[0])}")


if __name__ == "__main__":
    main()
