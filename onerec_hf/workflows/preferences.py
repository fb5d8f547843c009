"""Preference pairs of an alignment: read from a file, kept over the iterations of a training, saved as a data set with its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.modeling.files import listed, replacing
from onerec_hf.workflows.artefact import write_bytes

if TYPE_CHECKING:
    import datasets

    from onerec_hf.hub_cards import Alignment
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.workflows.dataset import RecommendationDataset

PAIRS_NAME = "pairs/pairs.parquet"


def read_preferences(path: str, processor: OneRecProcessor) -> datasets.Dataset:
    """
    Rows of history, chosen and rejected from a JSON lines or Parquet file.

    Raises:
        ValueError: another kind of file, missing columns, no rows, or items that the catalogue lacks.
    """
    from datasets import Dataset

    from onerec_hf.data.tables import load_table
    from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS

    where, wanted = f"--preferences {path}", ["history", "chosen", "rejected"]
    if Path(path).suffix not in (".jsonl", ".parquet") or not Path(path).is_file():
        raise ValueError(f"{where}: name an existing .jsonl or .parquet file")
    table = load_table(path)
    if any(column not in table.columns for column in wanted):
        raise ValueError(
            f"{where}: {len(table)} rows with {listed(table.columns)}; it needs rows with {', '.join(wanted)}"
        )
    columns = {column: [_items_of(value) for value in table[column]] for column in wanted}
    for column, rows in columns.items():
        bad = [row for row, items in enumerate(rows) if items is None]
        if bad:
            raise ValueError(
                f"{where}: {column!r} is no list of item ids in {len(bad)} of {len(rows)} rows (first: row {bad[0]}, counting from 0)"
            )
    assert processor.catalogue is not None
    items = [item for rows in columns.values() for items in rows for item in items or ()]
    try:
        unknown = (processor.catalogue.indices(items, unknown="mask") < 0).sum()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if unknown:
        raise ValueError(
            f"{where}: {unknown} of {len(items)} items are not in the model's catalogue; leave these rows out"
        )
    if processor.features is not None:  # a file of pairs has none: their values are missing
        columns |= {name: [None] * len(table) for name in FEATURE_COLUMNS}
    return Dataset.from_dict(columns)


def _items_of(value: Any) -> list | None:
    """A table's cell as a list of items; None for anything else."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return value if isinstance(value, list) else None


def keep_pairs(trainer) -> None:
    """Writes each iteration's pairs beside the checkpoints, for `kept_pairs`: the trainer itself keeps those of the last iteration."""
    from transformers import TrainerCallback

    class KeepPairs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            path = Path(str(args.output_dir), f"pairs-{trainer.iteration}.json")
            if args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, json.dumps(trainer.pairs.to_list()).encode())

    trainer.add_callback(KeepPairs())


def kept_pairs(trainer) -> list[dict[str, Any]]:
    """The pairs of all iterations, those before a resume included."""
    paths = [Path(trainer.args.output_dir, f"pairs-{iteration}.json") for iteration in range(trainer.iteration + 1)]
    return [row for path in paths if path.exists() for row in json.loads(path.read_text())]


def save_pairs(
    rows: list[dict[str, Any]], folder: Path, trainer, data: RecommendationDataset, command: str | None
) -> Alignment:
    """Saves the pairs of all iterations, if any, as a data set with a card; returns the facts for the model's card."""
    from datasets import Dataset

    from onerec_hf.hub_cards import Alignment, write_preferences_card

    pairs = Dataset.from_list(rows)
    alignment = Alignment.of(trainer, pairs)
    if rows:
        path = folder / PAIRS_NAME
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            pairs.to_parquet(temporary)
        write_preferences_card(
            path.parent,
            pairs,
            alignment,
            catalogue_hash=trainer.processing_class.catalogue.hash,
            data=f"{data.description} {data.protocol}",
            command=command,
        )
    return alignment
