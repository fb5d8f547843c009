"""
The session reward model on KuaiRand-Pure: AUC over all sessions, accuracy within users, calibration and log loss per objective on held-out days,
compared with logistic regression and gradient boosting (LightGBM) on the same item features, item statistics and history, and with the base rate.

    python benchmarks/alignment/reward.py --data_dir ../shared/data/kuairand_pure --json benchmarks/results/reward.json

Rows `onerec_reward/...` are means over the seeds with the smallest and largest; `spread` of the baselines' AUC and accuracy is the central 95 % of a bootstrap over
test users. `onerec_reward/score/...` is `reward()` against the mean label by weight. How well any model can order a user's sessions is measured by
`reward_ceiling.py`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/reward.py`

from benchmarks.harness import DATA, cpu_seconds, finish, one_thread, parser, say

WEIGHTS = {"swt": 1.0, "vtr": 1.0, "ltr": 1.0}  # of the recipe: follows are too rare to be compared


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
    options.add_argument(
        "--pair_weight", type=float, help="weight of pairs within users; the trainer's default if not given"
    )
    options.add_argument("--score_fusion", default="lift", choices=("lift", "probability", "p_score"))
    options.add_argument("--no_statistics", action="store_true", help="without item statistics")
    options.add_argument("--no_boosting", action="store_true", help="without LightGBM")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--save", help="folder for the trained model of the last seed")
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


def trained(feedback, args, seed: int) -> tuple[Any, Any, np.ndarray, float]:
    """A reward model of one seed with its items and their features, and the CPU seconds of its training."""
    import torch

    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments
    from onerec_hf.workflows.reward_training import RewardModelSettings, new_reward_model, use_later_statistics

    torch.manual_seed(seed)
    sizes = RewardModelSettings(
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        dropout_rate=args.dropout_rate,
        score_fusion=args.score_fusion,
        item_statistics=not args.no_statistics,
    )
    model, items, features = new_reward_model(feedback, sizes, WEIGHTS)
    started = cpu_seconds()
    with tempfile.TemporaryDirectory() as scratch:
        training = RewardTrainingArguments(
            scratch,
            num_train_epochs=args.epochs,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **({} if args.pair_weight is None else {"pair_weight": args.pair_weight}),
        )
        RewardTrainer(model, training, feedback.train).train()
    use_later_statistics(model, feedback)
    return model, items, features, cpu_seconds() - started


def boosted(x: np.ndarray, labels: np.ndarray, x_split: np.ndarray, quick: bool) -> np.ndarray:
    """(sessions, objectives) probabilities of LightGBM."""
    import lightgbm

    from benchmarks.alignment.reward_ceiling import SETTINGS

    def fitted(y: np.ndarray) -> np.ndarray:
        booster = lightgbm.train(SETTINGS, lightgbm.Dataset(x, y), 10 if quick else 150)
        return np.asarray(booster.predict(x_split))

    return np.stack([fitted(y) for y in labels.T], axis=1)


def main() -> None:
    args = arguments()
    one_thread()
    import transformers

    from onerec_hf.data import label_matrix, load_kuairand_feedback
    from onerec_hf.evaluation.results import result_row
    from onerec_hf.evaluation.reward_metrics import concordance, reward_metrics, within_group_concordance
    from onerec_hf.workflows.reward_training import (
        METRICS,
        baseline_features,
        predictions_beside_baselines,
        score_rows,
    )

    transformers.logging.set_verbosity_error()
    feedback = load_kuairand_feedback(args.data_dir, history=args.history)
    if args.quick:
        feedback = replace(feedback, train=feedback.train.select(range(1500)))
    held_out = getattr(feedback, args.split)
    labels, users = label_matrix(held_out), np.asarray(held_out["user_id"][:])
    found: dict[str, list[dict[str, float]]] = {"onerec_reward": []}
    predicted: dict[str, np.ndarray] = {}
    seconds = []
    for seed in args.seeds:
        model, items, features, spent = trained(feedback, args, seed)
        seconds.append(spent)
        if not predicted:
            predicted = predictions_beside_baselines(model, feedback, items, features, held_out)
            if not args.no_boosting:
                x, x_split = baseline_features(model, feedback, items, features, held_out)
                predicted["lightgbm"] = boosted(x, label_matrix(feedback.train), x_split, args.quick)
        p = model.predict(held_out["history"][:], held_out["session"][:]).double().numpy()
        metrics = reward_metrics(labels, p, feedback.objectives, feedback.base_rates, users=users)
        metrics |= {row["name"].removeprefix("onerec_reward/"): row["value"] for row in score_rows(model, held_out)}
        found["onerec_reward"].append(metrics)
        say(
            f"seed {seed}: {spent:.0f} CPU s, within users "
            + ", ".join(f"{metrics[f'{o}/within_user_accuracy']:.3f}" for o in feedback.objectives)
        )
    if args.save:
        model.save_pretrained(args.save)

    rows = []
    ordering = {
        "auc": lambda y, p, u: concordance(y, p),
        "within_user_accuracy": lambda y, p, u: within_group_concordance(y, p, u)[0],
    }
    for name, p in predicted.items():
        if name == "onerec_reward":
            continue
        metrics = reward_metrics(labels, p, feedback.objectives, feedback.base_rates, users=users)
        for k, objective in enumerate(feedback.objectives):
            for metric, unit in METRICS.items():
                spread = None
                if metric in ordering and name != "base_rate":
                    spread = user_bootstrap(labels[:, k], p[:, k], users, 20 if args.quick else 200, ordering[metric])
                against = None if name == "base_rate" else f"base_rate/{objective}/{metric}"
                rows.append(
                    result_row(f"{name}/{objective}/{metric}", metrics[f"{objective}/{metric}"], unit, against, spread)
                )
    for name in found["onerec_reward"][0]:
        objective, metric = name.split("/")
        values = [metrics[name] for metrics in found["onerec_reward"]]
        if metric not in METRICS:
            continue
        against = None if objective == "score" else f"base_rate/{name}"
        rows.append(
            result_row(
                f"onerec_reward/{name}", float(np.mean(values)), METRICS[metric], against, [min(values), max(values)]
            )
        )
    for k, objective in enumerate(feedback.objectives):
        rows.append(result_row(f"{args.split}/{objective}/mean_label", labels[:, k].mean(), "rate"))
        rows.append(result_row(f"{args.split}/{objective}/positives", (labels[:, k] > 0).sum(), "sessions"))
        pairs = within_group_concordance(labels[:, k], labels[:, k], users)[1]
        rows.append(result_row(f"{args.split}/{objective}/within_user_pairs", pairs, "pairs"))
    rows.append(
        result_row("onerec_reward/training", float(np.mean(seconds)), "CPU s", None, [min(seconds), max(seconds)])
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "data_dir", "save")}
    finish(rows, args.json, protocol=feedback.description, settings=settings)


if __name__ == "__main__":
    main()
