"""
What item scores add to beam search: beams guided by them from the first code on (`item_score_weight` of `recommend()`), compared with beams of the
decoder alone that are rescored afterwards, with the same and with ten times the beam width. All ways use the same weights.

    python benchmarks/quality/guidance.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty --model FOLDER --json benchmarks/results/guidance.json

FOLDER is a generator that `benchmarks/quality/run.py --keep` saved. Rows `DATASET/WAY-BEAMS-WEIGHT/METRIC`: NDCG@10 and recall@10 of validation users, `score`, the mean of the ten
best sums of both log-probabilities, and `cpu_seconds`, interleaved batch by batch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/guidance.py`

from benchmarks.harness import dataset_options, finish, one_thread, parser, say, train_options

BATCH = 250


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--model", help="a generator with item scores; with --quick an untrained one")
    options.add_argument("--weights", type=float, nargs="+", default=[1.0, 4.0, 16.0])
    options.add_argument("--beams", type=int, default=30)
    options.add_argument("--users", type=int, default=3000)
    return options.parse_args()


def main() -> None:
    options = arguments()
    one_thread()
    from benchmarks.quality.runs import Benchmark, parsed
    from onerec_hf.evaluation import ranking_metrics
    from onerec_hf.workflows import load_in_memory

    data_args, *_, training_args = parsed(train_options(options), {})
    data = load_in_memory(data_args)
    if options.quick:
        options.users, options.beams = 20, 5
    model, processor = untrained(data, data_args) if options.quick else loaded(options.model)
    catalogue, benchmark = processor.catalogue, Benchmark(data, training_args.eval_exclude_seen, 0, options.users)
    assert benchmark.selection is not None
    users = benchmark.selection.with_format(None)[:]
    relevant = catalogue.indices([session[0] for session in users["session"]])[:, None]
    ways, rows = [("guided", options.beams), ("rescored", options.beams), ("rescored", 10 * options.beams)], []
    for weight in options.weights:
        ranked: dict[tuple[str, int], list] = {way: [] for way in ways}
        scores, seconds = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
        for start in range(0, len(relevant), BATCH):
            histories = users["history"][start : start + BATCH]
            for way in ways:
                before = time.process_time()
                found, sums = recommended(model, processor, histories, weight, way[1], way[0] == "guided")
                seconds[way] += time.process_time() - before
                ranked[way].append(found)
                scores[way] += float(sums.sum())
        for way in ways:
            metrics = ranking_metrics(np.concatenate(ranked[way]), relevant, (10,), len(catalogue))
            name = f"{options.dataset}/{way[0]}-{way[1]}-{weight:g}"
            rows += _rows(name, metrics, scores[way] / len(relevant), seconds[way])
            say(f"{name}: {metrics['ndcg@10']:.4f}")
    finish(rows, options.json, users=len(relevant), protocol=data.split.description)


def recommended(model, processor, histories, weight: float, beams: int, guided: bool):
    """(users, 10) rows of the best items and (users,) means of their sums."""
    import torch

    from onerec_hf.modeling.item_head import history_states
    from onerec_hf.modeling.layers_onerec import at_places

    inputs = processor(histories)
    found = model.recommend(
        **inputs, session_length=1, num_beams=beams, num_return_sequences=beams, exclude=histories,
        item_score_weight=weight if guided else 0.0, return_dict_in_generate=True,
    )  # fmt: skip
    sequences, sums = found.sequences.view(len(histories), beams, -1), found.sequences_scores.view(-1, beams)
    if not guided:
        encoder = model.get_encoder()
        with torch.no_grad():
            states = encoder(**inputs).last_hidden_state
            states = history_states(states, at_places(inputs["attention_mask"], model.config.encoder_stride))
            items = (states @ encoder.item_head.output_vectors(encoder.embed_tokens).T).log_softmax(-1)
        names = encoder.item_head.rows(sequences[..., 1:]) - 1
        sums, order = (sums + weight * items.gather(1, names)).sort(dim=1, descending=True)
        sequences = sequences.gather(1, order[..., None].expand_as(sequences))
    best = min(10, beams)
    rows = processor.item_indices(sequences[:, :best].flatten(0, 1)).view(-1, best).numpy()
    return np.pad(rows, ((0, 0), (0, 10 - best)), constant_values=-1), sums[:, :best].mean(1)


def loaded(folder: str | None) -> tuple[Any, Any]:
    """The generator of a folder and its processor."""
    from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor

    if folder is None:
        raise SystemExit("name a generator: --model FOLDER, from benchmarks/quality/run.py --keep")
    model = cast(Any, OneRecForConditionalGeneration.from_pretrained(folder))
    return model.eval(), OneRecProcessor.from_pretrained(folder)


def untrained(data, data_args) -> tuple[Any, Any]:
    """A generator of random codes and weights."""
    from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor

    ids = list(data.item_ids)
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(64**3)[: len(ids)], (64, 64, 64)), axis=1)
    catalogue = ItemCatalogue(ids, codes, codebook_sizes=[64] * 3)
    config = OneRecConfig(
        codebook_sizes=[64] * 3, hidden_size=16, num_attention_heads=1, encoder_layers=1, decoder_layers=1, num_experts=1,
        item_head={"num_items": len(ids)},
    )  # fmt: skip
    model = OneRecForConditionalGeneration(config).eval()
    model.set_catalogue(catalogue)
    return model, OneRecProcessor.from_catalogue(catalogue, max_history=data_args.max_history)


def _rows(name: str, metrics: dict[str, float], score: float, seconds: float) -> list[dict[str, Any]]:
    from onerec_hf.evaluation.results import result_row

    values = {"ndcg@10": metrics["ndcg@10"], "recall@10": metrics["recall@10"]}
    return [
        *(result_row(f"{name}/{metric}", value, "share") for metric, value in values.items()),
        result_row(f"{name}/score", score, "nats"),
        result_row(f"{name}/cpu_seconds", seconds, "s"),
    ]


if __name__ == "__main__":
    main()
