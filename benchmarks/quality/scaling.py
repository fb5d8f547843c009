"""
Loss against size: generators of several widths, dense and with sparse experts at equal active parameters (paper, section 3.2: an expert is a
feed-forward layer; two of them here are as wide as the dense layer), trained on the same examples for the same steps.

    python benchmarks/quality/scaling.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty --json benchmarks/results/scaling.json \\
        --plot docs/images/scaling.png

Rows `DATASET/KIND-WIDTH/METRIC`: `loss`, nats that the codes of a validation user's next item cost (the sum over its levels, a mean over users;
of the whole vocabulary), `active`, `weights`, and `cpu_seconds` of training. Learning rates fall with the root of the width; nothing else is tuned.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/scaling.py`

from benchmarks.harness import cpu_seconds, dataset_options, finish, one_thread, parser, say, train_options

KINDS = {"dense": 1, "experts": 8}
HEAD, LEARNING_RATE, AT_WIDTH = 16, 3e-3, 64


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--steps", type=int, default=1000, help="of 128 examples")
    options.add_argument("--users", type=int, default=4000, help="validation users")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--plot", help="file for the figure")
    return options.parse_args()


def main() -> None:
    options = arguments()
    one_thread()
    if options.quick:
        options.widths, options.steps, options.users = [16, 32], 3, 50
    from benchmarks.quality.runs import parsed, with_windows
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.workflows import load_in_memory
    from onerec_hf.workflows.semantic_ids import fit_catalogue

    config = train_options(options)
    shared: dict[str, Any] = {"session_length": 1, "max_steps": options.steps, "per_device_train_batch_size": 128}
    if options.quick:
        shared["kmeans_iterations"] = 4
    data_args, id_args, *_ = parsed(config, shared)
    data = with_windows(load_in_memory(data_args), data_args, "windows")
    processor = OneRecProcessor.from_catalogue(
        fit_catalogue(data, id_args).catalogue, max_history=data_args.max_history
    )
    users = data.split.validation.shuffle(seed=0).select(range(options.users))
    rows = []
    for width in options.widths:
        for kind in options.kinds:
            runs = [
                trained(parsed(config, {**shared, **sizes(width, kind)}), data, processor, users, seed)
                for seed in options.seeds
            ]
            say(f"{kind}-{width}: {runs}")
            for metric, unit in {
                "loss": "nats",
                "active": "weights",
                "weights": "weights",
                "cpu_seconds": "s",
            }.items():
                rows.append(_row(f"{options.dataset}/{kind}-{width}/{metric}", [run[metric] for run in runs], unit))
    if options.plot:
        plot(rows, Path(options.plot))
    finish(rows, options.json, steps=options.steps, seeds=options.seeds, protocol=data.split.description)


def sizes(width: int, kind: str) -> dict[str, Any]:
    """Settings of a width: heads of 16, feed-forward layers of four widths, in two of the experts that a token uses together as well."""
    return {
        "hidden_size": width,
        "num_attention_heads": max(1, width // HEAD),
        "intermediate_size": 4 * width,
        "moe_intermediate_size": 2 * width,
        "num_experts": KINDS[kind],
        "learning_rate": LEARNING_RATE * math.sqrt(AT_WIDTH / width),
    }


def trained(args, data, processor, users, seed: int) -> dict[str, float]:
    """One generator's loss after its steps, and what it has and took."""
    from transformers import set_seed

    from onerec_hf.planning.parameters import active_parameters
    from onerec_hf.trainers import OneRecTrainer
    from onerec_hf.workflows.artefact import new_model

    data_args, _, model_args, _, training_args = args
    set_seed(seed)
    model = new_model(model_args, processor, data_args.session_length)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        training_args.output_dir, training_args.save_strategy, training_args.disable_tqdm = scratch, "no", True
        training_args.seed, training_args.logging_strategy = seed, "no"
        trainer = OneRecTrainer(model, training_args, train_dataset=data.split.train, processing_class=processor)
        before = cpu_seconds()
        trainer.train()
        seconds = cpu_seconds() - before
    return {
        "loss": item_loss(model, processor, users),
        "active": active_parameters(model.config),
        "weights": model.num_parameters(),
        "cpu_seconds": seconds,
    }


def item_loss(model, processor, examples) -> float:
    """Nats of a target item: the sum over its codes, the mean over users."""
    import torch

    total, model = 0.0, model.eval()
    for start in range(0, len(examples), 256):
        some = examples.with_format(None)[start : start + 256]
        batch = processor(some["history"], sessions=some["session"]).to(model.device)
        with torch.no_grad():
            total += float(model(**batch, num_items_in_batch=torch.tensor(1.0)).loss)
    return total / len(examples)


def _row(name: str, values: list[float], unit: str) -> dict[str, Any]:
    from onerec_hf.evaluation.results import result_row

    return result_row(name, statistics.mean(values), unit, spread=[min(values), max(values)])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss over active parameters, a line for each kind."""
    import matplotlib.pyplot as plt

    values = {row["name"].split("/", 1)[1]: row["value"] for row in rows}
    made, axis = plt.subplots(figsize=(5, 3.4))
    for kind in KINDS:
        names = [name.removesuffix("/loss") for name in values if name.startswith(kind) and name.endswith("/loss")]
        if names:
            axis.plot(
                [values[f"{name}/active"] for name in names],
                [values[f"{name}/loss"] for name in names],
                marker="o",
                label="dense" if kind == "dense" else f"{KINDS[kind]} experts, 2 used",
            )
    axis.set_xscale("log")
    axis.set_xlabel("active parameters")
    axis.set_ylabel("loss of the next item, nats")
    axis.legend()
    made.tight_layout()
    made.savefig(path, dpi=120)
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
