"""The folder of real data sets."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder():
    folder = Path(os.environ.get("ONEREC_HF_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (set ONEREC_HF_DATA)")
    return folder
