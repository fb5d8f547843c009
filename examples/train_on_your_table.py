"""
From a table of interactions to a saved, recommending OneRec model, in Python, step by step.

    python examples/train_on_your_table.py                                      # a synthetic table, a few seconds
    python examples/train_on_your_table.py --interactions ratings.csv --items films.csv --max_steps 2000 --codebook_size 64

The interactions need `user_id`, `item_id` and `timestamp`; the items need `item_id` and text columns.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, set_seed

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.baselines import PopularityBaseline
from onerec_hf.data import RecommendationData, UserSequences, leave_one_out, load_files, read_interactions, read_items
from onerec_hf.evaluation import ranking_metrics
from onerec_hf.semantic_ids import behaviour_embeddings, combine_embeddings, fit_semantic_ids, text_embeddings
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments


def synthetic_data(users: int = 150, items: int = 60, views: int = 10) -> RecommendationData:
    """Everyone walks along a ring of films, one or two steps at a time: there is something to learn, and nothing to download."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 3, (users, views)).cumsum(1) + rng.integers(0, items, (users, 1))
    interactions = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(users), views),
            "item_id": [f"film{step % items}" for step in steps.flat],
            "timestamp": np.tile(np.arange(views), users),
        }
    )
    genres = ["crime", "comedy", "drama", "horror", "musical", "western"]
    films = pd.DataFrame(
        {
            "item_id": [f"film{i}" for i in range(items)],
            "text": [f"a {genres[i * len(genres) // items]} number {i}" for i in range(items)],
        }
    )
    return RecommendationData("ring", read_interactions(interactions), read_items(films))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", help=".csv, .tsv, .parquet or .jsonl; a synthetic table when not given")
    parser.add_argument("--items", help="the same formats; without it semantic IDs come from behaviour alone")
    parser.add_argument("--output_dir", default="runs/your-table")
    parser.add_argument("--codebook_size", type=int, default=16, help="codes per level (three levels)")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    # 1. The table: positive feedback, in time order per user, without items that hardly anyone touched.
    data = load_files(args.interactions, args.items) if args.interactions else synthetic_data()
    sequences = UserSequences.from_interactions(data.positive.apply(data.interactions)).k_core(min_item=5)

    # 2. The last item of each user is for the test, the one before it for validation; windows over the rest are for training.
    split = leave_one_out(sequences, session_length=3, max_history=20)
    print(split.description)

    # 3. Semantic IDs, from what training users watched together and, where there is any, from text.
    item_ids, _ = sequences.item_counts()
    train_rows = [np.searchsorted(item_ids, items) for items in split.train_sequences.lists()]
    embeddings = [behaviour_embeddings(train_rows, len(item_ids), dim=32)]
    if data.items is not None:
        embeddings.append(text_embeddings(data.items.select(item_ids).frame["text"].tolist(), dim=32))
    fitted = fit_semantic_ids(item_ids, combine_embeddings(embeddings), [args.codebook_size] * 3, seed=args.seed)
    print(fitted.report.table())

    # 4. A small model for this catalogue.
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=20)
    config = OneRecConfig(
        codebook_sizes=fitted.catalogue.codebook_sizes,
        session_length=3,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_experts=8,
    )
    model = OneRecForConditionalGeneration(config)

    # 5. Training, then the ranking of the whole catalogue for each test user, beside popularity.
    trainer = OneRecTrainer(
        model,
        OneRecTrainingArguments(
            f"{args.output_dir}/checkpoints",
            max_steps=args.max_steps,
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            warmup_steps=10,
            logging_steps=20,
            save_strategy="no",
            eval_num_beams=20,
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=args.seed,
        ),
        train_dataset=split.train,
        eval_dataset=split.validation,
        processing_class=processor,
    )
    trainer.train()
    metrics = trainer.evaluate(split.test, metric_key_prefix="test")  # pyright: ignore[reportArgumentType]
    popularity = PopularityBaseline().fit(train_rows, len(item_ids))
    seen = [np.searchsorted(item_ids, history) for history in split.test["history"]]
    wanted = np.searchsorted(item_ids, [session[0] for session in split.test["session"]])
    baseline = ranking_metrics(popularity.recommend(seen, k=10), wanted, (10,), len(item_ids))
    print(f"recall@10: {metrics['test_recall@10']:.3f} (popularity: {baseline['recall@10']:.3f})")

    # 6. Saved as one folder, and loaded again as any other model.
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    fitted.quantizer.save(f"{args.output_dir}/codebooks.safetensors")
    processor = AutoProcessor.from_pretrained(args.output_dir)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.output_dir).eval()
    history = split.test[0]["history"]
    sessions = model.recommend(**processor([history]), num_beams=20, exclude_seen=True)
    print(f"after {history[-3:]} comes the session {processor.decode(sessions[0])}")


if __name__ == "__main__":
    main()
