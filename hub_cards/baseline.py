"""The card of a sequence model (SASRec, HSTU, GRU4Rec, ACVAE): architecture, data, and how well it ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onerec_hf.hub_cards.common import names, write_card

if TYPE_CHECKING:
    from onerec_hf.baselines.modeling_sequential import SequentialRecommender
    from onerec_hf.hub_cards.facts import Training

_ARCHITECTURES = {
    "sasrec": ("SASRec", "1808.09781"),
    "hstu": ("HSTU, positions only,", "2402.17152"),
    "gru4rec": ("GRU4Rec", "1511.06939"),
    "acvae": ("ACVAE", "2103.10693"),
}


def write_baseline_card(
    folder: str | os.PathLike,
    model: SequentialRecommender,
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
    Writes `README.md` for a trained sequence model into `folder`.

    Args:
        model: with its item ids.
        description: data and split, sentences with counts; the card says "not recorded" when not given.
        rows: result rows `model/metric` on held-out users. Those whose model is the architecture become the card's model index, with `dataset`.
        dataset: the data set's name.
        repo_id: the Hub repository that the card's snippet loads; `folder` when not given.
        training, command, metadata: as for `write_generator_card`.

    Raises:
        ValueError: a model without item ids.

    Example:
        >>> write_baseline_card("my-sasrec", model, split.description, rows)  # doctest: +SKIP
    """
    from huggingface_hub import EvalResult, ModelCardData

    config, named, items = model.config, names(folder, repo_id), model.items
    if items is None:
        raise ValueError("the model has no item ids: call set_items(item_ids) before its card is written")
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        ranked_by, metric = row["name"].split("/", 1)
        table.setdefault(ranked_by, {})[metric] = row["value"]
    of_this = table.get(config.architecture, {})
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="Sequential recommendation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for metric, value in of_this.items()
        if dataset is not None
    ]
    extra = dict(metadata or {})
    architecture, paper = _ARCHITECTURES[config.architecture]
    tags = ["sequential-recommendation", "recommendation", config.architecture, *extra.pop("tags", ())]
    write_card(
        folder,
        "baseline",
        ModelCardData(
            **{
                "library_name": "transformers",
                "pipeline_tag": "other",
                "tags": list(dict.fromkeys(tags)),
                "model_name": named["name"],
                "eval_results": results or None,
                **extra,
            }
        ),
        **named,
        architecture=architecture,
        paper=paper,
        history=items.item_ids[:3],
        num_items=len(items),
        parameters=model.num_parameters(),
        config=config,
        metrics=list(dict.fromkeys(metric for values in table.values() for metric in values)),
        table=table,
        description=description,
        training=training,
        command=command,
    )
