"""Fills the model card from what was trained and measured; a card says nothing that the run did not."""

from __future__ import annotations

import importlib.metadata
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
) -> None:
    """
    Writes `README.md` for a trained generator into `folder`.

    Args:
        protocol: how the data was split, one sentence with counts.
        rows: result rows named `model/metric`; those of `onerec` become the card's model index.

    Example:
        >>> write_generator_card("my-model", processor, model, source, split.description, rows)  # doctest: +SKIP
    """
    import jinja2

    scores = [row for row in rows if "/" in row["name"]]
    metrics = [row["name"].split("/")[1] for row in scores if row["name"].startswith("onerec/")]
    table: dict[str, list[str]] = {}
    for row in scores:
        table.setdefault(row["name"].split("/")[0], []).append(f"{row['value']:.4f}")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(files(__package__).joinpath("templates/generator.md.jinja").read_text())
    folder = Path(folder)
    packages = ("onerec-hf", "transformers", "torch")
    card = template.render(
        name=folder.resolve().name,
        path=str(folder),
        example_history=repr(processor.catalogue.ids(range(min(3, len(processor.catalogue))))),
        catalogue=processor.catalogue,
        config=model.config,
        parameters=model.num_parameters(),
        max_history=processor.max_history,
        source=source,
        protocol=protocol,
        metrics=metrics,
        table=table,
        model_index=[row for row in scores if row["name"].startswith("onerec/")],
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    )
    temporary = folder / f"README.md.{os.getpid()}.tmp"
    temporary.write_text(card, encoding="utf-8")
    os.replace(temporary, folder / "README.md")
