"""
The session reward model on KuaiRand-Pure: AUC, calibration and log loss per objective on held-out days, compared with logistic regression on the same
item features and history and with the base rate. 95 % intervals of AUC come from a bootstrap over test users, one seed of training.

    python benchmarks/alignment/reward.py --data_dir ../shared/data/kuairand_pure --json benchmarks/results/reward.json
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/reward.py`

from benchmarks.harness import DATA, cpu_seconds, finish, one_thread, parser


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/kuairand_pure", help="folder of KuaiRand-Pure's Parquet files")
    options.add_argument(
        "--split", default="test", choices=("test", "validation"), help="validation to choose settings"
    )
    options.add_argument("--epochs", type=float, default=2)
    options.add_argument("--hidden_size", type=int, default=64)
    options.add_argument("--dropout_rate", type=float, default=0.1)
    options.add_argument("--history", default="long_watch_seq", help="long_watch_seq, watch_seq or like_seq")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--save", help="folder for the trained model")
    return options.parse_args()


def user_bootstrap(
    labels: np.ndarray, predicted: np.ndarray, users: np.ndarray, draws: int, metric: Callable[..., float]
) -> list[float]:
    """
    The central 95 % of a metric of labels, predictions and users over draws of users with replacement; a user who is drawn twice counts as two.
    """
    rng = np.random.default_rng(0)
    owners = np.unique(users, return_inverse=True)[1]
    order = np.argsort(owners, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(owners))[:-1])
    values = []
    for _ in range(draws):
        parts = [rows[u] for u in rng.integers(len(rows), size=len(rows))]
        drawn, again = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        values.append(metric(labels[drawn], predicted[drawn], again))
    return np.nanquantile(values, [0.025, 0.975]).tolist()


def main() -> None:
    args = arguments()
    one_thread()
    import torch
    import transformers

    from onerec_hf.data import label_matrix, load_kuairand_feedback
    from onerec_hf.evaluation.results import result_row
    from onerec_hf.evaluation.reward_metrics import reward_metrics
    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments
    from onerec_hf.workflows.reward_training import (
        METRICS,
        RewardModelSettings,
        new_reward_model,
        predictions_beside_baselines,
    )

    transformers.logging.set_verbosity_error()
    feedback = load_kuairand_feedback(args.data_dir, history=args.history)
    if args.quick:
        feedback = replace(feedback, train=feedback.train.select(range(1500)))
    held_out = getattr(feedback, args.split)
    labels, base_rates = label_matrix(held_out), feedback.base_rates
    torch.manual_seed(args.seed)
    sizes = RewardModelSettings(
        hidden_size=args.hidden_size, intermediate_size=2 * args.hidden_size, dropout_rate=args.dropout_rate
    )
    model, items, features = new_reward_model(feedback, sizes)
    started = cpu_seconds()
    with tempfile.TemporaryDirectory() as scratch:
        training = RewardTrainingArguments(
            scratch,
            num_train_epochs=args.epochs,
            seed=args.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RewardTrainer(model, training, feedback.train)
        trainer.train()
    seconds = cpu_seconds() - started
    predicted = predictions_beside_baselines(model, feedback, items, features, held_out)
    if args.save:
        model.save_pretrained(args.save)

    users, rows = np.asarray(held_out["user_id"][:]), []
    for name, p in predicted.items():
        found = reward_metrics(labels, p, feedback.objectives, base_rates)
        for k, objective in enumerate(feedback.objectives):
            for metric, unit in METRICS.items():
                spread = None
                if metric == "auc" and name != "base_rate":
                    spread = user_bootstrap(labels[:, k], p[:, k], users, 20 if args.quick else 200)
                against = None if name == "base_rate" else f"base_rate/{objective}/{metric}"
                rows.append(
                    result_row(f"{name}/{objective}/{metric}", found[f"{objective}/{metric}"], unit, against, spread)
                )
    for k, objective in enumerate(feedback.objectives):
        rows.append(result_row(f"{args.split}/{objective}/mean_label", labels[:, k].mean(), "rate"))
        rows.append(result_row(f"{args.split}/{objective}/positives", (labels[:, k] > 0).sum(), "sessions"))
    rows.append(result_row("onerec_reward/training", seconds, "CPU s"))
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "data_dir", "save")}
    finish(rows, args.json, protocol=feedback.description, settings=settings)


if __name__ == "__main__":
    main()
