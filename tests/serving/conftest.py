"""A saved model, and a server that most tests share."""

import pytest

from onerec_hf import OneRecProcessor
from tests.conftest import make_catalogue, make_model
from tests.serving.running import Running


@pytest.fixture(scope="session")
def save(tmp_path_factory):
    """Saves a tiny model into a folder of its own, or a given one: `save(seed=1)`, `save(folder, num_items=30)`."""

    def write(folder=None, seed=0, **catalogue):
        folder = tmp_path_factory.mktemp("served") / "model" if folder is None else folder
        items = make_catalogue(**catalogue)
        make_model(items, seed=seed).save_pretrained(folder, include_code=False)
        OneRecProcessor.from_catalogue(items, max_history=10).save_pretrained(folder, include_code=False)
        return folder

    return write


@pytest.fixture(scope="session")
def folder(save):
    return save()


@pytest.fixture(scope="session")
def server(folder):
    """Limits are small; a batch waits long enough for what is sent at once."""
    limits = {"max_histories": 8, "max_history_items": 50, "max_list_items": 45, "max_body_bytes": 20_000}
    with Running(folder, max_batch_size=8, max_wait_ms=50, max_queue=64, **limits) as running:
        yield running
