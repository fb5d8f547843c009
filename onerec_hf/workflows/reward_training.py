"""From labelled impressions to a saved session reward model, evaluated with baselines on a later period."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.workflows.artefact import recorded_in, save_trained
from onerec_hf.workflows.distributed import is_first, say, wait
from onerec_hf.workflows.results import RewardResult
from onerec_hf.workflows.resuming import as_before, record_of
from onerec_hf.workflows.reward_data import RewardDataSettings, load_feedback
from onerec_hf.workflows.run_folder import begin, finish, open_folder, own_folder, resumable
from onerec_hf.workflows.settings import OutputSettings, gather
from onerec_hf.workflows.training_report import calibration_panels, training_panels, write_training_report

if TYPE_CHECKING:
    from datasets import Dataset

    from onerec_hf.data import SessionFeedback
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.processing_onerec_reward import RewardItems

METRICS = {
    "auc": "share",
    "within_user_accuracy": "share",
    "calibration_error": "rate",
    "bias": "ratio",
    "relative_log_loss": "ratio",
}
ATTRIBUTES = ("tags", "author", "type", "duration_ms")


@dataclass
class RewardModelSettings:
    """Size of the reward model and fusion of its objectives."""

    hidden_size: int = field(default=64, metadata={"help": "Width."})
    intermediate_size: int = field(default=128, metadata={"help": "Width of the feed-forward layers."})
    history_layers: int = field(default=1, metadata={"help": "Self-attention layers over the history."})
    session_layers: int = field(default=1, metadata={"help": "Self-attention layers over the session."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    tower_size: int = field(default=32, metadata={"help": "Width of an objective's tower."})
    max_history: int = field(default=50, metadata={"help": "Number of latest history items to read."})
    pooling: str = field(default="sum", metadata={"help": "sum (the paper's) or mean of a session's items."})
    dropout_rate: float = field(default=0.1, metadata={"help": "Dropout."})
    score_fusion: str = field(
        default="lift",
        metadata={
            "help": "What the score is: lift (mean over base rates), probability (mean), or p_score (a trained head)."
        },
    )
    score_weights: list[str] | None = field(
        default=None, metadata={"help": "NAME=WEIGHT of objectives in score(); 1 each by default."}
    )
    behaviour_dim: int = field(default=64, metadata={"help": "Width of the co-watching features; 0 leaves them out."})
    item_statistics: bool = field(
        default=False, metadata={"help": "Read impressions and feedback rates of items in the period before."}
    )


def train_reward(
    data: SessionFeedback | RewardDataSettings, *settings: object, command: str | None = None, **options
) -> RewardResult:
    """
    Trains a session reward model, evaluates it with base rate and logistic regression on the test period, and saves it with
    `results.json` and card into `output_dir`. `resume_from_checkpoint="last"` resumes a run that was killed.

    Args:
        data: labelled impressions, or the settings to load them after the options are checked.
        settings: [`RewardModelSettings`], [`OutputSettings`] and [`~onerec_hf.trainers.RewardTrainingArguments`], each optional, in any
            order.
        command: the command line, for results and card.
        options: single fields of these settings; `output_dir` where no training arguments are given.

    Raises:
        ValueError, FileExistsError, RunComplete, KeyboardInterrupt, TypeError: as for `train`.

    Example:
        >>> result = train_reward(load_feedback(...), output_dir="runs/reward", num_train_epochs=2)  # doctest: +SKIP
        >>> result.metrics["onerec_reward/vtr/auc"]  # doctest: +SKIP
    """
    from transformers import set_seed

    from onerec_hf.data import label_matrix
    from onerec_hf.hub_cards import Training, write_reward_card
    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments

    kinds = (RewardModelSettings, OutputSettings, RewardTrainingArguments)
    sizes, output, args = gather(kinds, settings, options)
    args = copy.copy(args)
    folder = Path(args.output_dir)
    with own_folder(folder):
        resumes = open_folder(folder, output.overwrite, args)
        (sizes, output, args), given, before = as_before(kinds, (sizes, output, args), settings, options)
        weights = numbers_of("--score_weights", sizes.score_weights)
        started = time.perf_counter()
        name = None
        if isinstance(data, RewardDataSettings):
            name = data.dataset or data.impressions
            data = load_feedback(data, max_history=sizes.max_history)
        say(data.description)
        about = {"description": data.description, "objectives": data.objectives, "base_rates": data.base_rates}
        record = record_of(before, args.resume_from_checkpoint, given, about, kinds, args)
        set_seed(args.seed)  # the model's first weights are drawn before Trainer would do so
        model, items, features = new_reward_model(data, sizes, weights)
        args.output_dir = str(folder / "checkpoints")
        trainer = RewardTrainer(model, args, data.train, data.validation)
        trainer.add_callback(record.callback())
        begin(folder, command, resumes)
        with resumable(folder, command), contextlib.redirect_stdout(sys.stderr):
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            use_later_statistics(trainer.accelerator.unwrap_model(trainer.model), data)
            save_trained(trainer, folder)
        rows = []
        if is_first():
            predicted = predictions_beside_baselines(model, data, items, features, data.test)
            rows = [*metric_rows(predicted, data), *score_rows(model, data.test)]
            rows.append(result_row("seconds", time.perf_counter() - started, "s"))
            write_results(
                folder / "results.json",
                rows,
                command=command,
                seed=args.seed,
                dataset=name,
                protocol=data.description,
                **({"resumed_with": record.changes} if record.changes else {}),
            )
            calibration = calibration_panels(label_matrix(data.test), predicted, data.objectives)
            write_training_report(folder, [*training_panels(trainer), *calibration], [data.description])
            write_reward_card(
                folder,
                model,
                data.description,
                rows,
                None if name is None else Path(name).stem,
                training=Training.of(trainer),
                command=command,
            )
            recorded_in(folder, model)
            finish(folder)
            say(f"saved to {folder}; align a generator with it: onerec-hf align --reward {folder} --help")
        wait()
        return RewardResult(rows, folder, trainer)


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


def item_features(feedback: SessionFeedback, items: RewardItems, behaviour_dim: int = 64) -> tuple[np.ndarray, str]:
    """(items, d) features from the attributes, given embeddings and co-watching before the validation period that are there; and their names."""
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
        sequences = [items.indices(sequence.tolist()) for sequence in feedback.train_sequences]
        parts.append(behaviour_embeddings(sequences, len(items), dim=behaviour_dim))
        names.append("behaviour")
    if not parts:
        return np.zeros((len(items), 0), dtype=np.float32), "none"
    return combine_embeddings(parts), "+".join(names)


def new_reward_model(
    feedback: SessionFeedback, settings: RewardModelSettings, weights: dict[str, float] | None = None
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
    features, recipe = item_features(feedback, items, settings.behaviour_dim)
    sizes = {
        name: value
        for name, value in vars(settings).items()
        if name not in ("score_weights", "behaviour_dim", "item_statistics")
    }
    statistics = _statistics(feedback, later=False) if settings.item_statistics else None
    counted = feedback.statistics
    if settings.item_statistics and (statistics is None or counted is None or not counted.shown.any()):
        raise ValueError(
            "--item_statistics: there are no impressions before the training windows to count. Pass a later --history_end, or leave it out"
        )
    try:
        config = OneRecRewardConfig(
            num_items=len(items),
            item_feature_dim=features.shape[1],
            statistics_dim=0 if statistics is None else statistics.shape[1],
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
    if statistics is not None:
        model.set_statistics(statistics)
    return model, items, features


def use_later_statistics(model: OneRecForSessionReward, feedback: SessionFeedback) -> None:
    """
    Gives a model that was trained with the statistics before the training windows those before the validation windows. A model without statistics
    stays as it is.
    """
    statistics = _statistics(feedback, later=True) if model.config.statistics_dim else None
    if statistics is not None:
        model.set_statistics(statistics)


def _statistics(feedback: SessionFeedback, later: bool) -> np.ndarray | None:
    """(items, d) statistics before the training or the validation windows, of the objectives that the first have feedback for."""
    if feedback.statistics is None or feedback.later_statistics is None:
        return None
    counted = feedback.later_statistics if later else feedback.statistics
    return counted.features(feedback.statistics.known)


def predictions_beside_baselines(
    model: OneRecForSessionReward, feedback: SessionFeedback, items: RewardItems, features: np.ndarray, split: Dataset
) -> dict[str, np.ndarray]:
    """(sessions, objectives) probabilities of the base rate, of logistic regression (with features), and of the model."""
    from onerec_hf.baselines.session_reward import predict_baseline
    from onerec_hf.data import label_matrix

    labels = label_matrix(feedback.train)
    x, x_split = baseline_features(model, feedback, items, features, split)
    kinds = ("base_rate", "logistic_regression") if x.shape[1] > 2 else ("base_rate",)
    predicted = {kind: predict_baseline(kind, x, labels, x_split) for kind in kinds}
    predicted["onerec_reward"] = model.predict(split["history"][:], split["session"][:]).double().numpy()
    return predicted


def baseline_features(
    model: OneRecForSessionReward, feedback: SessionFeedback, items: RewardItems, features: np.ndarray, split: Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training windows and of the split's with what the model reads: item features, and the statistics that it reads of each."""
    from onerec_hf.baselines.session_reward import session_features

    earlier, tables = _statistics(feedback, later=False), (features, features)
    if model.item_statistics is not None and earlier is not None:
        read = (earlier, model.item_statistics[1:].cpu().numpy())
        tables = tuple(np.concatenate([features, statistics], axis=1) for statistics in read)
    of_train, of_split = (
        session_features(table, *([items.indices(row) for row in part[name]] for name in ("history", "session")))
        for table, part in zip(tables, (feedback.train, split), strict=True)
    )
    return of_train, of_split


def metric_rows(predicted: dict[str, np.ndarray], feedback: SessionFeedback) -> list[dict[str, Any]]:
    """Result rows `model/objective/metric` of predictions for the test period."""
    from onerec_hf.data import label_matrix
    from onerec_hf.evaluation.reward_metrics import reward_metrics, within_group_concordance

    labels, users, rows = label_matrix(feedback.test), feedback.test["user_id"][:], []
    for name, p in predicted.items():
        found = reward_metrics(labels, p, feedback.objectives, feedback.base_rates, users=users)
        for objective in feedback.objectives:
            for metric, unit in METRICS.items():
                value = found.get(f"{objective}/{metric}", float("nan"))  # no label in the test period
                rows.append(result_row(f"{name}/{objective}/{metric}", value, unit))
    for k, objective in enumerate(feedback.objectives):
        known = labels[:, k] >= 0
        pairs = within_group_concordance(labels[known, k], labels[known, k], np.asarray(users)[known])[1]
        rows.append(result_row(f"test/{objective}/positives", float((labels[:, k] > 0).sum()), "sessions"))
        rows.append(result_row(f"test/{objective}/within_user_pairs", float(pairs), "pairs"))
    return rows


def score_rows(model: OneRecForSessionReward, split: Dataset) -> list[dict[str, Any]]:
    """
    Result rows of `reward()`, the number that alignment uses, against the mean label by the model's weights (rows without missing labels): AUC and
    accuracy within users.
    """
    from onerec_hf.data import label_matrix
    from onerec_hf.evaluation.reward_metrics import concordance, within_group_concordance

    names, weights = model.config.objectives or [], model.config.score_weights
    weight = np.array([1.0 if weights is None else weights.get(name, 0.0) for name in names])
    labels = label_matrix(split)[:, weight != 0]
    known = ~np.isnan(labels).any(1)
    if not known.any():
        return []
    outcome = labels[known] @ weight[weight != 0] / weight.sum()
    scores = np.array(model.reward(split["history"][:], split["session"][:]))[known]
    found = {
        "auc": concordance(outcome, scores),
        "within_user_accuracy": within_group_concordance(outcome, scores, np.asarray(split["user_id"][:])[known])[0],
    }
    return [result_row(f"onerec_reward/score/{metric}", value, "share") for metric, value in found.items()]
