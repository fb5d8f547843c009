"""Card of the generator: semantic IDs, model, data, ranking metrics with baselines, alignment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from onerec_hf.hub_cards.alignment import Alignment, before_and_after
from onerec_hf.hub_cards.common import hub_id, names, write_card
from onerec_hf.hub_cards.experts import EXPERT_LOAD_NAME, load_over_mean, parameter_counts, plot_expert_load
from onerec_hf.semantic_ids.report import SemanticIDReport

if TYPE_CHECKING:
    from onerec_hf.hub_cards.facts import Training
    from onerec_hf.modeling.catalogue import ItemCatalogue
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

REPORT_NAME = "semantic_ids.json"


class DataSource(Protocol):
    """Description of the data: short name, origin and licence."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...


def write_generator_card(
    folder: str | os.PathLike,
    processor: OneRecProcessor,
    model: OneRecForConditionalGeneration,
    source: DataSource | None = None,
    protocol: str = "",
    rows: Sequence[dict[str, Any]] = (),
    repo_id: str | None = None,
    exclude_seen: bool = True,
    *,
    num_beams: int | None = None,
    counts: Mapping[str, int] | None = None,
    choices: Sequence[tuple[str, str, str]] = (),
    training: Training | None = None,
    alignment: Alignment | None = None,
    tokens_per_expert: Any = None,
    features: Sequence[tuple[str, str, float, float]] = (),
    command: str | None = None,
    note: str = "",
    verdict: str = "",
    data_options: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes `README.md` for a trained generator to `folder`, and `expert_load.png` if `tokens_per_expert` is given and matplotlib is installed.
    Reads codebooks and the report of the semantic IDs (`semantic_ids.json`) from the folder if present.

    Args:
        source: the dataset (default: not recorded).
        protocol: filtering and split of the data, sentences with counts.
        rows: result rows named `model/metric`; those of `onerec` become the card's model index, and `before/onerec/metric`,
            `reward/before`, `heldout_reward/before` with theirs after the table of the alignment.
        repo_id: the Hub repository for the card's snippet (default: `folder`).
        exclude_seen, num_beams: whether the rows exclude seen items, and the beam width of the ranking.
        counts: counts of the data, by name.
        choices: options of the training that a preset set: name, value and reason.
        training: `Training.of(trainer)`.
        alignment: `Alignment.of(trainer)`.
        tokens_per_expert: (decoder_layers, num_experts), `OneRecTrainer.tokens_per_expert`.
        features: what each feature is worth: side, name, NDCG lost without its values, standard error.
        command: the command line of the run.
        note: which model the metrics are of, where it is not the saved one.
        verdict: the model against the baselines, in words.
        data_options: the options that the data was made with, as on the command line.
        metadata: further front matter, e.g. `{"license": "mit"}`; its tags are added to the card's.

    Example:
        >>> write_generator_card("my-model", processor, model, source, split.description, rows)  # doctest: +SKIP
    """
    from huggingface_hub import ModelCardData

    folder, catalogue, named = Path(folder), processor.catalogue, names(folder, repo_id)
    assert catalogue is not None
    scores = [(*row["name"].split("/", 1), row["value"]) for row in rows if "/" in row["name"]]
    table: dict[str, dict[str, float]] = {}
    for scored, metric, value in scores:
        table.setdefault(scored, {})[metric] = value
    metrics = [metric for metric in table.get("onerec", ()) if "/" not in metric]
    extra = dict(metadata or {})
    tags = ["onerec", "generative-recommendation", "semantic-ids", *extra.pop("tags", ())]
    tags += ["mixture-of-experts"] * (model.config.num_experts > 1)
    total, active = parameter_counts(model)
    load = None if tokens_per_expert is None else np.asarray(tokens_per_expert)
    write_card(
        folder,
        "generator",
        ModelCardData(
            **{
                "library_name": "transformers",
                "pipeline_tag": "other",
                "tags": list(dict.fromkeys(tags)),
                "base_model": hub_id(model.config),
                "model_name": named["name"],
                "eval_results": _eval_results(source, {metric: table["onerec"][metric] for metric in metrics}),
                **extra,
            }
        ),
        **named,
        example_history=catalogue.ids(range(min(3, len(catalogue)))),
        catalogue=catalogue,
        levels=code_use(catalogue),
        report=_report(folder, catalogue),
        codebooks=(folder / "codebooks.safetensors").exists(),
        pictures={name: (folder / name).exists() for name in ("training_report.png", "semantic_ids.html")},
        config=model.config,
        item_score_weight=getattr(model.generation_config, "item_score_weight", 0),  # no field of transformers'
        parameters=total,
        active=active,
        load=None if load is None else load_over_mean(load),
        loaded_tokens=None if load is None else int(load[0].sum()) // model.config.num_experts_per_tok,
        plot=EXPERT_LOAD_NAME if load is not None and plot_expert_load(load, folder / EXPERT_LOAD_NAME) else None,
        max_history=processor.max_history,
        features=features,
        source=source,
        protocol=protocol,
        counts=counts or {},
        choices=choices,
        exclude_seen=exclude_seen,
        unranked=next((int(row["value"]) for row in rows if row["name"] == "unranked_users"), 0),
        num_beams=num_beams,
        metrics=metrics,
        table={
            scored: [values.get(metric) for metric in metrics]
            for scored, values in table.items()
            if values.keys() & set(metrics)  # other rows, such as those of alignment, are not ranking metrics
        },
        alignment=alignment,
        before_after=before_and_after(list(rows)),
        popularity=popularity_facts(catalogue),
        training=training,
        command=command,
        note=note,
        verdict=verdict,
        data_options=data_options,
    )


def _eval_results(source: DataSource | None, scores: dict[str, float]) -> list | None:
    from huggingface_hub import EvalResult

    if source is None:
        return None
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="Generative recommendation",
            dataset_type=source.name,
            dataset_name=source.name,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in scores.items()
    ]
    return results or None


def code_use(catalogue: ItemCatalogue) -> list[dict[str, int]]:
    """
    Per level: codebook size, number of codes in use, and the fewest and most items per code.

    Example:
        >>> from onerec_hf import ItemCatalogue
        >>> code_use(ItemCatalogue(["a", "b", "c"], [[0, 0], [0, 1], [1, 1]], [2, 4]))[0]
        {'size': 2, 'used': 2, 'fewest': 1, 'most': 2}
    """
    levels = []
    for column, size in zip(catalogue.codes.T, catalogue.codebook_sizes, strict=True):
        use = np.bincount(column, minlength=size)
        levels.append({"size": size, "used": int((use > 0).sum()), "fewest": int(use.min()), "most": int(use.max())})
    return levels


def popularity_facts(catalogue: ItemCatalogue) -> dict[str, float] | None:
    """
    Number of items without training interactions, and the share of interactions with the most popular 10 % of items. None if the catalogue
    has no popularity.

    Example:
        >>> from onerec_hf import ItemCatalogue
        >>> popularity_facts(ItemCatalogue(["a", "b"], [[0], [1]], [2], popularity=[3, 0]))
        {'cold': 1, 'top_share': 1.0}
    """
    counts = catalogue.popularity
    if counts is None or not counts.sum():
        return None
    top = np.sort(counts)[::-1][: -(-len(counts) // 10)]
    return {"cold": int((counts == 0).sum()), "top_share": float(top.sum() / counts.sum())}


def _report(folder: Path, catalogue: ItemCatalogue) -> SemanticIDReport | None:
    """The report of the semantic IDs if present; it does not apply to a catalogue that has changed since."""
    path = folder / REPORT_NAME
    if catalogue.version or not path.is_file():
        return None
    return SemanticIDReport.load(path)
