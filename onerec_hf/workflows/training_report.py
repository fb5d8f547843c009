"""The training report beside a model: loss, validation, load of the experts, quality by popularity; calibration of a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.workflows.artefact import catalogue_of
from onerec_hf.workflows.compare.analysis import thirds
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.pictures import Panel, draw_png, panels_html, write_page

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer
    from onerec_hf.workflows.evaluation import Ranking

REPORT_HTML, REPORT_PNG = "training_report.html", "training_report.png"
_RANKING = ("recall@", "ndcg@", "mrr@")


def write_training_report(folder: Path, panels: Sequence[Panel], about: Sequence[str] = ()) -> None:
    """
    Writes `training_report.html` and, if matplotlib is installed, `training_report.png`; the first rank writes. Without any panel nothing is written.

    Args:
        about: sentences above the pictures.
    """
    if not panels or not is_first():
        return
    parts = [f"<p>{escape(sentence)}</p>" for sentence in about if sentence]
    write_page(folder / REPORT_HTML, f"Training report of {folder.resolve().name}", parts + panels_html(panels))
    draw_png(folder / REPORT_PNG, panels)


def training_panels(trainer: Any) -> list[Panel]:
    """The panels that a trainer's logs fill: losses, validation metrics, load of the experts."""
    return [*log_panels(trainer.state.log_history), *load_panel(getattr(trainer, "tokens_per_expert", None))]


def report_panels(trainer: OneRecTrainer, ranking: Ranking) -> list[Panel]:
    """The panels of a generator's training, with the ranking of the test users; the first rank has them all."""
    ks = cast("Any", trainer.args).eval_top_k
    catalogue = catalogue_of(cast("OneRecProcessor", trainer.processing_class))
    k = 10 if 10 in ks else max(ks)
    return [*training_panels(trainer), *popularity_panel(ranking, catalogue.popularity, k)]


def log_panels(history: Sequence[Mapping[str, float]]) -> list[Panel]:
    """
    Losses and validation metrics by step.

    Args:
        history: `trainer.state.log_history`.

    Example:
        >>> panels = log_panels([{"loss": 3.0, "step": 50}, {"eval_loss": 2.8, "eval_ndcg@10": 0.1, "step": 50}])
        >>> [(panel.title, dict(panel.series)) for panel in panels]
        [('Loss', {'training': [(50, 3.0)], 'validation': [(50, 2.8)]}), ('Validation', {'ndcg@10': [(50, 0.1)]})]
    """

    def points(name: str) -> list[tuple[float, float]]:
        found = [(row["step"], row[name]) for row in history if row.get(name) is not None and "step" in row]
        return [(step, value) for step, value in found if np.isfinite(value)]

    named = dict.fromkeys(name for row in history for name in row if name.startswith("eval_"))
    metrics = [name for name in named if name.removeprefix("eval_").startswith(_RANKING) or name.endswith("/auc")]
    most = max((int(name.split("@")[1]) for name in metrics if "@" in name), default=0)
    k = 10 if any(name.endswith("@10") for name in metrics) else most
    metrics = [name for name in metrics if "@" not in name or name.endswith(f"@{k}")]
    # A run shorter than `logging_steps` has the mean of all its steps only.
    losses = {"training": points("loss") or points("train_loss"), "validation": points("eval_loss")}
    measured = {name.removeprefix("eval_"): points(name) for name in metrics}
    panels = [
        Panel(
            "Loss",
            "curves",
            losses,
            "step",
            "loss",
            note="Mean over the steps since the last log, and on validation users.",
        ),
        Panel("Validation", "curves", measured, "step", "share", note="Evaluations during training."),
    ]
    filled = [{name: some for name, some in panel.series.items() if some} for panel in panels]
    return [
        Panel(panel.title, panel.kind, series, panel.x_label, panel.y_label, note=panel.note)
        for panel, series in zip(panels, filled, strict=True)
        if series
    ]


def load_panel(tokens_per_expert: Any) -> list[Panel]:
    """
    The load of each expert over the training, relative to its layer's mean; none without experts.

    Example:
        >>> load_panel([[30, 10], [20, 20]])[0].series["layer 1"]
        [(0, 1.5), (1, 0.5)]
    """
    if tokens_per_expert is None:
        return []
    counts = np.asarray(tokens_per_expert, dtype=np.float64)
    load = counts / counts.mean(1, keepdims=True)
    series = {f"layer {layer + 1}": list(enumerate(row.tolist())) for layer, row in enumerate(load)}
    note = "Tokens of each expert, relative to the mean of its layer: 1 is balanced."
    return [Panel("Load of the experts", "grid", series, "expert", "load over mean", note=note)]


def popularity_panel(ranking: Ranking, popularity: np.ndarray | None, k: int) -> list[Panel]:
    """
    NDCG by how often the target occurs in training, of the model and the baselines; none without counts.

    Args:
        ranking: of the test users.
        popularity: (items,) training interactions.
        k: cut-off of the metric.
    """
    from onerec_hf.evaluation import ndcg_at_k

    if popularity is None or not ranking.ranked:
        return []
    first = ranking.relevant[:, 0]  # the next item, where a session is held out
    known = first >= 0
    groups = {name: mask & known for name, mask in thirds(np.where(known, popularity[first], 0)).items()}
    groups = {name: mask for name, mask in groups.items() if mask.any()}
    series = {}
    for model, ranked in ranking.ranked.items():
        gains = np.asarray(ndcg_at_k(ranked, ranking.relevant, k, per_row=True))
        series[model] = [(place, float(gains[mask].mean())) for place, mask in enumerate(groups.values())]
    labels = [f"{name} ({mask.sum():,} users)" for name, mask in groups.items()]
    note = "Test users in thirds, by how often their target occurs in training."
    return [
        Panel(
            "Quality by popularity", "groups", series, "training interactions of the target", f"NDCG@{k}", labels, note
        )
    ]


def calibration_panels(
    labels: np.ndarray, predicted: Mapping[str, np.ndarray], objectives: Sequence[str]
) -> list[Panel]:
    """
    Predicted against observed rates of a reward model and its baselines, a panel per objective.

    Args:
        labels: (sessions, objectives), NaN or negative where missing.
        predicted: (sessions, objectives) probabilities by model.

    Example:
        >>> labels, p = np.array([[0.0], [1.0]]), np.array([[0.25], [0.75]])
        >>> calibration_panels(labels, {"onerec_reward": p}, ["vtr"])[0].series
        {'onerec_reward': [(0.25, 0.0), (0.75, 1.0)]}
    """
    from onerec_hf.evaluation.reward_metrics import calibration_curve

    panels = []
    for column, objective in enumerate(objectives):
        known = labels[:, column] >= 0
        if not known.any():
            continue
        series = {}
        for model, probabilities in predicted.items():
            means = calibration_curve(labels[known, column], probabilities[known, column])
            series[model] = [(mean, rate) for mean, rate, _ in means]
        note = "Test sessions in ten groups of equal size, sorted by prediction. On the dashed line, predictions are calibrated."
        panels.append(
            Panel(f"Calibration of {objective}", "diagonal", series, "predicted rate", "observed rate", note=note)
        )
    return panels
