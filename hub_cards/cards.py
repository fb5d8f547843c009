"""Fills the model card from what was trained and measured; a card says nothing that the run did not."""

from __future__ import annotations

import html
import importlib.metadata
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.modeling.files_onerec import replacing

if TYPE_CHECKING:
    from onerec_hf.data import RecommendationData
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


def write_generator_card(
    folder: str | os.PathLike,
    processor: OneRecProcessor,
    model: OneRecForConditionalGeneration,
    source: RecommendationData,
    protocol: str,
    rows: list[dict[str, Any]],
    repo_id: str | None = None,
    exclude_seen: bool = True,
) -> None:
    """
    Writes `README.md` for a trained generator into `folder`.

    Args:
        protocol: how the data was filtered and split, sentences with counts.
        rows: result rows named `model/metric`; those of `onerec` become the card's model index.
        repo_id: the Hub repository that the card's snippet loads; `folder` when not given.
        exclude_seen: whether the rows leave out what a user has seen.

    Example:
        >>> write_generator_card("my-model", processor, model, source, split.description, rows)  # doctest: +SKIP
    """
    import jinja2
    from huggingface_hub import EvalResult, ModelCardData

    folder, catalogue = Path(folder), processor.catalogue
    assert catalogue is not None
    name = folder.resolve().name if repo_id is None else repo_id.split("/")[-1]
    scores = [(*row["name"].split("/", 1), row["value"]) for row in rows if "/" in row["name"]]
    table: dict[str, dict[str, str]] = {}
    for scored, metric, value in scores:
        table.setdefault(scored, {})[metric] = f"{value:.4f}"
    metrics = list(table.get("onerec", ()))
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="Generative recommendation",
            dataset_type=source.name,
            dataset_name=source.name,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for scored, metric, value in scores
        if scored == "onerec"
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="other",
        tags=["onerec", "generative-recommendation", "semantic-ids"]
        + ["mixture-of-experts"] * (model.config.num_experts > 1),
        model_name=name,
        eval_results=results or None,
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"text": plain_text, "python": repr}
    template = environment.from_string(
        files("onerec_hf.hub_cards").joinpath("templates/generator.md.jinja").read_text(encoding="utf-8")
    )
    packages = ("onerec-hf", "transformers", "torch")
    card = template.render(
        card_data=card_data.to_yaml(),
        name=name,
        path=str(folder) if repo_id is None else repo_id,
        example_history=catalogue.ids(range(min(3, len(catalogue)))),
        catalogue=catalogue,
        codebooks=(folder / "codebooks.safetensors").exists(),
        config=model.config,
        parameters=model.num_parameters(),
        max_history=processor.max_history,
        source=source,
        protocol=protocol,
        exclude_seen=exclude_seen,
        metrics=metrics,
        table={
            scored: [values.get(metric, "") for metric in metrics]
            for scored, values in table.items()
            if values.keys() & set(metrics)  # other rows, as of alignment, are no ranking
        },
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    )
    with replacing(folder / "README.md") as temporary:
        Path(temporary).write_text(card, encoding="utf-8")


def plain_text(value: object) -> str:
    """
    A name as one line of Markdown text: nothing in it becomes markup, HTML or a table cell.

    Example:
        >>> plain_text("<b>my_films*")
        '&lt;b&gt;my\\\\_films\\\\*'
    """
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
