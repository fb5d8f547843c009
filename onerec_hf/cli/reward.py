"""`onerec-hf reward`: impressions with feedback to a saved session reward model, judged on later days beside simpler ones."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.cli.arguments import OutputArguments, command_line, parse
from onerec_hf.cli.train import resumable
from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.run_folder import begin, finish, open_folder
from onerec_hf.workflows.steps import save_trained, say, table

if TYPE_CHECKING:
    from datasets import Dataset

    from onerec_hf.data.feedback.kuairand import SessionFeedback
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.processing_onerec_reward import RewardItems

METRICS = {"auc": "share", "calibration_error": "rate", "bias": "ratio", "relative_log_loss": "ratio"}
ATTRIBUTES = ("tags", "author", "type", "duration_ms")


@dataclass
class RewardDataArguments(OutputArguments):
    """Which impressions, and how they become labelled sessions."""

    dataset: str | None = field(
        default=None, metadata={"help": "A named source: kuairand-pure. Or give --impressions."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the named source's files."})
    impressions: str | None = field(
        default=None,
        metadata={"help": "Your own table, a row per impression: user, item, timestamp and a column per objective."},
    )
    objectives: list[str] | None = field(
        default=None, metadata={"help": "NAME=COLUMN of --impressions, values in [0, 1], e.g. vtr=viewed ltr=liked."}
    )
    history_end: float | None = field(
        default=None, metadata={"help": "Timestamp before which impressions are history (--impressions)."}
    )
    validation_start: float | None = field(
        default=None, metadata={"help": "First timestamp (kuairand-pure: day, 20220503) of the validation period."}
    )
    test_start: float | None = field(
        default=None, metadata={"help": "First timestamp (kuairand-pure: day, 20220506) of the test period."}
    )
    history_objective: str | None = field(
        default=None, metadata={"help": "Only impressions above 0 in this objective enter histories; all by default."}
    )
    items: str | None = field(
        default=None,
        metadata={"help": "Your items: item_id, and any of tags, author, type, duration_ms as features."},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": ".npy of item embeddings, a row per row of --items, as features."}
    )
    min_items: int = field(default=5, metadata={"help": "Fewest impressions of a session."})
    max_items: int = field(default=10, metadata={"help": "Most impressions of a session."})
    user_column: str = field(default="user_id", metadata={"help": "Name of the user column."})
    item_column: str = field(default="item_id", metadata={"help": "Name of the item column."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Name of the time column."})


@dataclass
class RewardModelArguments:
    """Size of the reward model, and how its objectives become one number."""

    hidden_size: int = field(default=64, metadata={"help": "Width."})
    intermediate_size: int = field(default=128, metadata={"help": "Width of the feed-forward layers."})
    history_layers: int = field(default=1, metadata={"help": "Self-attention layers over the history."})
    session_layers: int = field(default=1, metadata={"help": "Self-attention layers over the session."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    tower_size: int = field(default=32, metadata={"help": "Width of an objective's tower."})
    max_history: int = field(default=50, metadata={"help": "Latest items of a history that are read."})
    pooling: str = field(default="sum", metadata={"help": "sum (the paper's) or mean of a session's items."})
    dropout_rate: float = field(default=0.1, metadata={"help": "Dropout."})
    score_fusion: str = field(
        default="lift", metadata={"help": "lift (over base rates) or probability: what score() averages."}
    )
    score_weights: list[str] | None = field(
        default=None, metadata={"help": "NAME=WEIGHT of objectives in score(); 1 each by default."}
    )
    behaviour_dim: int = field(default=64, metadata={"help": "Width of the co-watching features; 0 leaves them out."})


def main(argv: list[str]) -> None:
    from transformers import set_seed

    from onerec_hf.hub_cards import Training, write_reward_card
    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments

    data_args, model_args, training_args = parse(
        (RewardDataArguments, RewardModelArguments, RewardTrainingArguments), argv, "reward", ["--output_dir"]
    )
    folder, command = Path(training_args.output_dir), command_line("reward", argv)
    goes_on = open_folder(folder, data_args.overwrite, training_args)
    weights = numbers_of("--score_weights", model_args.score_weights)
    started = time.perf_counter()
    feedback = load_feedback(data_args, model_args.max_history)
    say(feedback.description)
    set_seed(training_args.seed)  # the model's first weights are drawn before Trainer would do so
    model, items, features = new_reward_model(feedback, model_args, weights)
    training_args.output_dir = str(folder / "checkpoints")
    trainer: Any = RewardTrainer(model, training_args, feedback.train, feedback.validation)
    begin(folder, command, goes_on)
    with resumable(folder, command), contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        save_trained(trainer, folder)
    if not is_first():
        return
    rows = rows_beside_baselines(model, feedback, items, features)
    rows.append(result_row("seconds", time.perf_counter() - started, "s"))
    write_results(
        folder / "results.json",
        rows,
        command=command,
        seed=training_args.seed,
        dataset=data_args.dataset or data_args.impressions,
        protocol=feedback.description,
    )
    write_reward_card(
        folder,
        model,
        feedback.description,
        rows,
        data_args.dataset or Path(data_args.impressions).stem,
        training=Training.of(trainer),
        command=command,
    )
    finish(folder)
    say(f"saved to {folder}; align a generator with it: onerec-hf align --reward {folder} --help")
    print_reward(rows, feedback.objectives)


def numbers_of(option: str, pairs: list[str] | None) -> dict[str, float] | None:
    """
    `NAME=NUMBER` options as a dict.

    Raises:
        ValueError: a text of another form.

    Example:
        >>> numbers_of("--score_weights", ["vtr=1", "ltr=0.5"])
        {'vtr': 1.0, 'ltr': 0.5}
    """
    if pairs is None:
        return None
    try:
        return {name: float(value) for name, value in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise ValueError(f"{option} {' '.join(pairs)}: write NAME=NUMBER, e.g. vtr=1 ltr=0.5") from None


def load_feedback(args: RewardDataArguments, max_history: int) -> SessionFeedback:
    """
    Labelled windows of a named source or of the user's own table.

    Raises:
        ValueError: neither or both, or options that are lacking; DataError: what is wrong with the table.
    """
    from onerec_hf.data import load_kuairand_feedback
    from onerec_hf.data.interactions import read_items
    from onerec_hf.data.feedback.impressions import load_impressions

    if (args.dataset is None) == (args.impressions is None):
        raise ValueError("give either --dataset kuairand-pure with --data_dir, or --impressions, your own table")
    if args.dataset is not None:
        if args.dataset != "kuairand-pure" or args.data_dir is None:
            raise ValueError(
                f"--dataset {args.dataset}: with labelled impressions there is kuairand-pure, and it needs --data_dir"
            )
        return load_kuairand_feedback(
            args.data_dir,
            validation_start=int(args.validation_start or 20220503),
            test_start=int(args.test_start or 20220506),
            min_items=args.min_items,
            max_items=args.max_items,
        )
    lacking = [
        f"--{name}"
        for name in ("objectives", "history_end", "validation_start", "test_start")
        if getattr(args, name) is None
    ]
    if lacking:
        raise ValueError(f"--impressions needs {', '.join(lacking)} too")
    assert args.objectives is not None
    assert args.impressions is not None
    objectives = {pair.split("=")[0]: pair.split("=")[-1] for pair in args.objectives}
    if args.embeddings is not None and args.items is None:
        raise ValueError("--embeddings needs --items: they have a row per row of it")
    items = None if args.items is None else read_items(args.items, embeddings=args.embeddings)
    assert args.history_end is not None
    assert args.validation_start is not None
    assert args.test_start is not None
    return load_impressions(
        args.impressions,
        objectives,
        args.history_end,
        args.validation_start,
        args.test_start,
        items=items,
        history_objective=args.history_objective,
        min_items=args.min_items,
        max_items=args.max_items,
        max_history=max_history,
        user_column=args.user_column,
        item_column=args.item_column,
        timestamp_column=args.timestamp_column,
    )


def item_features(feedback: SessionFeedback, items: RewardItems, behaviour_dim: int = 64) -> tuple[np.ndarray, str]:
    """(items, d) features from what there is: attributes, given embeddings, co-watching before the validation period; and what they are."""
    from onerec_hf.semantic_ids import attribute_embeddings, behaviour_embeddings, combine_embeddings

    parts, names = [], []
    frame, given = feedback.items.frame, feedback.items.embeddings
    if set(ATTRIBUTES) <= set(frame.columns):
        tags, authors, types, durations = (frame[name].tolist() for name in ATTRIBUTES)
        parts.append(attribute_embeddings(tags, authors, types, durations))
        names.append("attributes")
    if given is not None:
        parts.append(np.asarray(given))
        names.append("given")
    if behaviour_dim:
        sequences = [items.rows(sequence.tolist()) for sequence in feedback.train_sequences]
        parts.append(behaviour_embeddings(sequences, len(items), dim=behaviour_dim))
        names.append("behaviour")
    if not parts:
        return np.zeros((len(items), 0), dtype=np.float32), "none"
    return combine_embeddings(parts), "+".join(names)


def new_reward_model(
    feedback: SessionFeedback, args: RewardModelArguments, weights: dict[str, float] | None = None
) -> tuple[OneRecForSessionReward, RewardItems, np.ndarray]:
    """
    An untrained reward model for the data, its items and their features.

    Raises:
        ValueError: sizes that do not fit together, weights of unknown objectives.
    """
    from huggingface_hub.errors import StrictDataclassError

    from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
    from onerec_hf.semantic_ids import embedding_fingerprint

    items = RewardItems(feedback.items.item_ids)
    features, recipe = item_features(feedback, items, args.behaviour_dim)
    sizes = {name: value for name, value in vars(args).items() if name not in ("score_weights", "behaviour_dim")}
    try:
        config = OneRecRewardConfig(
            num_items=len(items),
            item_feature_dim=features.shape[1],
            objectives=feedback.objectives,
            base_rates=feedback.base_rates,
            score_weights=weights,
            feature_fingerprint=embedding_fingerprint(features, recipe) if features.shape[1] else None,
            **sizes,
        )
    except StrictDataclassError as error:
        raise ValueError(f"model options: {error.__cause__ or error}") from error
    model = OneRecForSessionReward(config)
    model.set_items(items, features if features.shape[1] else None)
    return model, items, features


def predictions_beside_baselines(
    model: OneRecForSessionReward, feedback: SessionFeedback, items: RewardItems, features: np.ndarray, split: Dataset
) -> dict[str, np.ndarray]:
    """(sessions, objectives) probabilities of the base rate, of logistic regression where there are features, and of the model."""
    from onerec_hf.baselines.session_reward import predict_baseline, session_features
    from onerec_hf.data import label_matrix

    labels = label_matrix(feedback.train)
    columns = [
        [items.rows(row) for row in part[name]] for part in (feedback.train, split) for name in ("history", "session")
    ]
    x, x_split = session_features(features, *columns[:2]), session_features(features, *columns[2:])
    kinds = ("base_rate", "logistic_regression") if features.shape[1] else ("base_rate",)
    predicted = {kind: predict_baseline(kind, x, labels, x_split) for kind in kinds}
    predicted["onerec_reward"] = model.predict(split["history"][:], split["session"][:]).double().numpy()
    return predicted


def rows_beside_baselines(
    model: OneRecForSessionReward, feedback: SessionFeedback, items: RewardItems, features: np.ndarray
) -> list[dict[str, Any]]:
    """Result rows `model/objective/metric` on the test period."""
    from onerec_hf.data import label_matrix
    from onerec_hf.evaluation.reward_metrics import reward_metrics

    labels, rows = label_matrix(feedback.test), []
    for name, p in predictions_beside_baselines(model, feedback, items, features, feedback.test).items():
        found = reward_metrics(labels, p, feedback.objectives, feedback.base_rates)
        for objective in feedback.objectives:
            for metric, unit in METRICS.items():
                rows.append(result_row(f"{name}/{objective}/{metric}", found[f"{objective}/{metric}"], unit))
    for k, objective in enumerate(feedback.objectives):
        rows.append(result_row(f"test/{objective}/positives", float((labels[:, k] > 0).sum()), "sessions"))
    return rows


def print_reward(rows: list[dict[str, Any]], objectives: list[str]) -> None:
    """The metrics as a table: an objective and a model per line."""
    values = {row["name"]: row["value"] for row in rows}
    models = [
        name
        for name in ("base_rate", "logistic_regression", "onerec_reward")
        if f"{name}/{objectives[0]}/auc" in values
    ]
    lines = [
        [objective, name, *(f"{values[f'{name}/{objective}/{metric}']:.4f}" for metric in METRICS)]
        for objective in objectives
        for name in models
    ]
    print(table(lines, ["", "", *METRICS]))
