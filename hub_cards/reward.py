"""Card of the reward model: objectives, their fusion, and prediction metrics with baselines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onerec_hf.hub_cards.common import names, write_card

if TYPE_CHECKING:
    from onerec_hf.hub_cards.facts import Training
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

METRICS = ("auc", "within_user_accuracy", "calibration_error", "bias", "relative_log_loss")


def write_reward_card(
    folder: str | os.PathLike,
    model: OneRecForSessionReward,
    description: str = "",
    rows: Sequence[dict[str, Any]] = (),
    dataset: str | None = None,
    repo_id: str | None = None,
    *,
    training: Training | None = None,
    command: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes `README.md` for a trained reward model to `folder`.

    Args:
        description: data and split, sentences with counts (`SessionFeedback.description`; default: not recorded).
        rows: result rows `model/objective/metric` on held-out data, for `onerec_reward` and baselines, and `test/objective/positives`.
        dataset: name of the dataset, for the model index.
        repo_id: the Hub repository for the card's snippet (default: `folder`).
        training, command, metadata: as for `write_generator_card`.

    Example:
        >>> write_reward_card("my-judge", model, feedback.description, rows)  # doctest: +SKIP
    """
    from huggingface_hub import EvalResult, ModelCardData

    config, named, items = model.config, names(folder, repo_id), model.items
    assert items is not None
    values = {row["name"]: row["value"] for row in rows}
    models = list(dict.fromkeys(name.split("/")[0] for name in values if name.endswith("/auc")))
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="Session reward",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=f"{objective} {metric}",
            metric_value=round(value, 4),
        )
        for objective in config.objectives
        for metric in METRICS
        if (value := values.get(f"onerec_reward/{objective}/{metric}")) is not None and value == value
        if dataset is not None
    ]
    extra = dict(metadata or {})
    weights = config.score_weights or dict.fromkeys(config.objectives, 1.0)
    write_card(
        folder,
        "reward",
        ModelCardData(
            **{
                "library_name": "transformers",
                "pipeline_tag": "other",
                "tags": list(dict.fromkeys(["onerec", "reward-model", "recommendation", *extra.pop("tags", ())])),
                "model_name": named["name"],
                "eval_results": results or None,
                **extra,
            }
        ),
        **named,
        examples=items.item_ids[:3],
        items=items,
        config=config,
        parameters=model.num_parameters(),
        objectives=[
            (name, rate, weights.get(name, 0.0), values.get(f"test/{name}/positives"))
            for name, rate in zip(config.objectives, config.base_rates, strict=True)
        ],
        metrics=METRICS,
        table=[
            (objective, scored, [values.get(f"{scored}/{objective}/{metric}") for metric in METRICS])
            for objective in config.objectives
            for scored in models
        ],
        models=models,
        description=description,
        training=training,
        command=command,
    )
