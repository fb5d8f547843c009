"""
The session reward model on KuaiRand-Pure: AUC over all sessions, accuracy within users, calibration and log loss per objective on held-out days,
compared with logistic regression and gradient boosting (LightGBM) on item features, item statistics and history, and with the base rate.

    python benchmarks/alignment/reward.py --data_dir ../shared/data/kuairand_pure --json benchmarks/results/reward.json

Rows `MODEL/OBJECTIVE/METRIC` are of the test days, `validation/...` of the validation days, on which settings are chosen. `onerec_reward` has the
settings of before, `statistics` adds item statistics and the P-Score, `pairs` pairs within users in addition. Their rows are means over the seeds with the smallest and
largest; `spread` of the baselines' AUC and accuracy is the central 95 % of a bootstrap over users. `score` is `reward()` against the mean label by weight.
How well any model can order a user's sessions is measured by `reward_ceiling.py`.
"""

from __future__ import annotations

import sys
import tempfile
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
    options.add_argument("--epochs", type=float, default=2)
    options.add_argument("--hidden_size", type=int, default=64)
    options.add_argument("--dropout_rate", type=float, default=0.1)
    options.add_argument("--history", default="long_watch_seq", help="long_watch_seq, watch_seq or like_seq")
    options.add_argument("--pair_weight", type=float, default=1.0, help="of the variant with pairs within users")
    options.add_argument("--no_boosting", action="store_true", help="without LightGBM")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--save", help="folder for the trained model of the last seed")
    return options.parse_args()


def user_bootstrap(labels: np.ndarray, predicted: np.ndarray, users: np.ndarray, draws: int) -> list[float]:
    """The central 95 % of AUC over draws of users with replacement."""
    from onerec_hf.evaluation.reward_metrics import concordance

    rng = np.random.default_rng(0)
    owners = np.unique(users, return_inverse=True)[1]
    order = np.argsort(owners, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(owners))[:-1])
    values = []
    for _ in range(draws):
        drawn = np.concatenate([rows[u] for u in rng.integers(len(rows), size=len(rows))])
        values.append(concordance(labels[drawn], predicted[drawn]))
    return np.nanquantile(values, [0.025, 0.975]).tolist()


def pairs_bootstrap(
    labels: np.ndarray, predicted: np.ndarray, users: np.ndarray, least: float = 0.0
) -> tuple[float, list[float]]:
    """Accuracy within users of pairs whose labels are more than `least` apart, and its central 95 % over 1,000 draws of users with replacement."""
    from onerec_hf.evaluation.reward_metrics import within_group_pairs

    right, pairs = within_group_pairs(labels, predicted, users, least)
    counts = np.random.default_rng(0).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=1000)
    total = counts @ pairs
    values = np.divide(counts @ right, total, out=np.full(len(total), np.nan), where=total > 0)
    spread = np.nanquantile(values, [0.025, 0.975]).tolist() if pairs.any() else [float("nan")] * 2
    return (float(right.sum() / pairs.sum()) if pairs.any() else float("nan")), spread


def trained(feedback, args, seed: int, name: str) -> tuple[Any, Any, np.ndarray, float]:
    """A reward model of one seed with its items and their features, and the CPU seconds of its training."""
    import torch

    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments
    from onerec_hf.workflows.reward_training import RewardModelSettings, new_reward_model, use_later_statistics

    torch.manual_seed(seed)
    sizes = RewardModelSettings(
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        dropout_rate=args.dropout_rate,
        score_fusion="lift" if name == "onerec_reward" else "p_score",
        item_statistics=name != "onerec_reward",
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
            pair_weight=args.pair_weight if name == "pairs" else 0.0,
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
    from onerec_hf.evaluation.reward_metrics import reward_metrics, within_group_concordance
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
    parts = {"validation": feedback.validation, "test": feedback.test}
    labels = {part: label_matrix(split) for part, split in parts.items()}
    users = {part: np.asarray(split["user_id"][:]) for part, split in parts.items()}
    found: dict[str, list[float]] = {}
    predicted: dict[str, np.ndarray] = {}
    for seed in args.seeds:
        for name in ("statistics", "onerec_reward", "pairs"):
            model, items, features, spent = trained(feedback, args, seed, name)
            if name == "pairs" and not predicted:
                predicted = predictions_beside_baselines(model, feedback, items, features, feedback.test)
                if not args.no_boosting:
                    x, x_test = baseline_features(model, feedback, items, features, feedback.test)
                    predicted["lightgbm"] = boosted(x, label_matrix(feedback.train), x_test, args.quick)
                del predicted["onerec_reward"]
            metrics = {f"{name}/training": spent}
            for part, split in parts.items():
                p = model.predict(split["history"][:], split["session"][:]).double().numpy()
                prefix = name if part == "test" else f"{part}/{name}"
                each = reward_metrics(labels[part], p, feedback.objectives, feedback.base_rates, users=users[part])
                each |= {row["name"].removeprefix("onerec_reward/"): row["value"] for row in score_rows(model, split)}
                metrics |= {f"{prefix}/{metric}": value for metric, value in each.items()}
                ordered = ", ".join(
                    f"{o} {each[f'{o}/within_user_accuracy']:.3f}" for o in (*feedback.objectives, "score")
                )
                say(f"seed {seed}, {prefix}, {spent:.0f} CPU s: {ordered}")
            for metric, value in metrics.items():
                found.setdefault(metric, []).append(value)
    if args.save:
        model.save_pretrained(args.save)

    rows = []
    for name, p in predicted.items():
        metrics = reward_metrics(labels["test"], p, feedback.objectives, feedback.base_rates, users=users["test"])
        for k, objective in enumerate(feedback.objectives):
            given = labels["test"][:, k], p[:, k], users["test"]
            for metric, unit in METRICS.items():
                spread = None
                if metric == "auc" and name != "base_rate":
                    spread = user_bootstrap(*given, 20 if args.quick else 200)
                if metric == "within_user_accuracy" and name != "base_rate":
                    spread = pairs_bootstrap(*given)[1]
                against = None if name == "base_rate" else f"base_rate/{objective}/{metric}"
                rows.append(
                    result_row(f"{name}/{objective}/{metric}", metrics[f"{objective}/{metric}"], unit, against, spread)
                )
    for name, values in found.items():
        metric = name.split("/")[-1]
        if unit := {**METRICS, "training": "CPU s"}.get(metric):
            against = None
            if metric in METRICS and "/score/" not in name and not name.startswith("validation/"):
                against = f"base_rate/{'/'.join(name.split('/')[1:])}"
            rows.append(result_row(name, float(np.mean(values)), unit, against, [min(values), max(values)]))
    for part in parts:
        for k, objective in enumerate(feedback.objectives):
            y = labels[part][:, k]
            rows.append(result_row(f"{part}/{objective}/mean_label", y.mean(), "rate"))
            rows.append(result_row(f"{part}/{objective}/positives", (y > 0).sum(), "sessions"))
            pairs = within_group_concordance(y, y, users[part])[1]
            rows.append(result_row(f"{part}/{objective}/within_user_pairs", pairs, "pairs"))
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "data_dir", "save")}
    finish(rows, args.json, protocol=feedback.description, settings=settings)


if __name__ == "__main__":
    main()
