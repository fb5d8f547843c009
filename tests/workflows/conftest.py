"""A made-up data set, as DataFrames and as files, and the settings of a tiny model."""

import pandas as pd
import pytest

from tests.cli.commands import interaction_rows, item_rows, write_csv

TINY = {
    "preset": "paper",
    "codebook_sizes": [8, 8, 8],
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "max_steps": 3,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "verdict_sasrec": False,
}


def frame(rows: list) -> pd.DataFrame:
    """A table with a header row as a DataFrame."""
    return pd.DataFrame(rows[1:], columns=rows[0])


def options_of(settings: dict) -> list[str]:
    """The same settings as options of a command."""
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


@pytest.fixture(scope="session")
def tables():
    """Interactions and items as DataFrames."""
    return {"interactions": frame(interaction_rows()), "items": frame(item_rows())}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The same tables as CSV files."""
    folder = tmp_path_factory.mktemp("tables")
    return {
        "interactions": str(write_csv(folder / "interactions.csv", interaction_rows())),
        "items": str(write_csv(folder / "items.csv", item_rows())),
    }
