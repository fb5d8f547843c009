"""
What benchmarks/quality/search.py draws from: the same kinds of settings for each family (learning rate, batch, size, dropout, smoothed labels, weight decay,
length), around what the field uses for it, wide enough to hold the rows of the contest that were tuned by hand but for
TIGER's 6,400 steps: 16 such runs at once do not end in the ten minutes that a command had.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Family:
    """
    Args:
        says: its name in the table.
        row: of _quality_rows.py, whose settings stand where the space says nothing.
        recipe: sizes of a generator, and for all how long a history is.
        space: values per setting; a value that is a dict sets what its keys name.
    """

    says: str
    row: str
    recipe: str
    space: dict[str, list[Any]]

    def ways(self) -> dict[str, list[dict[str, Any]]]:
        """What each value of each setting sets."""
        return {
            name: [value if isinstance(value, dict) else {name: value} for value in values]
            for name, values in self.space.items()
        }


# Until validation has not risen for eight epochs, or a cosine that ends.
LENGTH: list[Any] = [
    {"schedule": "constant", "patience": 8},
    {"schedule": "cosine", "epochs": 12, "patience": 12},
    {"schedule": "cosine", "epochs": 20, "patience": 20},
]
SEQUENCE: dict[str, list[Any]] = {
    "lr": [0.0005, 0.001, 0.002, 0.004],
    "batch_size": [128, 256, 512],
    "dropout": [0.3, 0.4, 0.5, 0.6],
    "label_smoothing": [0, 0.1, 0.2, 0.3],
    "weight_decay": [0.01, 0.05, 0.1],
    "length": LENGTH,
}
SASREC: dict[str, list[Any]] = {**SEQUENCE, "width": [128, 256, 384], "layers": [1, 2, 3]}

FAMILIES = {
    "tiger": Family(
        "TIGER of our parts",
        "tiger",
        "amazon_beauty_gpu.yaml",
        {
            "learning_rate": [0.0005, 0.001, 0.002, 0.004],
            "per_device_train_batch_size": [512, 1024],
            "size": [
                {
                    "hidden_size": width,
                    "intermediate_size": 4 * width,
                    "encoder_layers": layers,
                    "decoder_layers": layers,
                }
                for width in (128, 192)
                for layers in (2, 3, 4)
            ],
            "dropout_rate": [0.1, 0.2, 0.3],
            "label_smoothing_factor": [0, 0.1],
            "weight_decay": [0.01, 0.05, 0.1],
            "max_steps": [3000, 4000],
        },
    ),
    "gru4rec": Family(
        "GRU4Rec",
        "gru4rec",
        "amazon_beauty_gpu.yaml",
        {
            **SEQUENCE,
            "lr": [0.001, 0.002, 0.004, 0.008],
            "width": [128, 256, 384],
            "inner": [256, 512, 768],
            "layers": [1, 2],
        },
    ),
    "hstu": Family(
        "HSTU", "hstu", "amazon_beauty_gpu.yaml", {**SEQUENCE, "width": [64, 128, 256], "layers": [2, 3, 4]}
    ),
    "sasrec": Family("SASRec", "sasrec_ce", "amazon_beauty_gpu.yaml", SASREC),
    "sasrec_text": Family("SASRec that reads items' texts too", "sasrec_ce_text", "amazon_beauty_gpu.yaml", SASREC),
    "onerec": Family(
        "OneRec",
        "onerec_items_smoothed",
        "amazon_beauty_items.yaml",
        {
            "learning_rate": [0.002, 0.0035, 0.005, 0.007],
            "per_device_train_batch_size": [8, 16],
            "width": [{"hidden_size": width, "intermediate_size": 2 * width} for width in (64, 128, 192)],
            "encoder_layers": [1, 2, 3],
            "dropout_rate": [0.35, 0.4, 0.45, 0.5],
            "item_embedding_dropout": [0, 0.2, 0.3, 0.4],
            "label_smoothing_factor": [0, 0.1, 0.2],
            "weight_decay": [0.02, 0.05, 0.1],
            "num_train_epochs": [8, 10, 13],
            "embedding": ["given+behaviour", "aligned+behaviour"],
            "item_score_weight": [8, 16, 32],
        },
    ),
}

METRIC = "validation/ndcg@10"  # of all validation users: what says which draw is best
# Which of 16 draws validation liked best, on an H200 (benchmarks/results/quality_search.json).
WINNERS = {"tiger": 8, "gru4rec": 1, "hstu": 14, "sasrec": 4, "sasrec_text": 11, "onerec": 8}


def drawn(family: str, trial: int) -> dict[str, Any]:
    """
    The settings of a family's draw of this number: each of its space alike likely, the same in every run and however many are drawn.

    Example:
        >>> drawn("sasrec", 0) == drawn("sasrec", 0) != drawn("sasrec", 1)
        True
    """
    rng = np.random.default_rng([zlib.crc32(family.encode()), trial])
    settings: dict[str, Any] = {}
    for ways in FAMILIES[family].ways().values():
        settings |= ways[rng.integers(len(ways))]
    return settings


def name_of(family: str, trial: int) -> str:
    """The row of a draw."""
    return f"search_{family}_{trial:02d}"


def winner(family: str) -> str:
    """The row of a family's best draw, trained anew and judged on test; those of WINNERS are rows of _quality_rows.py."""
    return f"searched_{family}"
