"""A small synthetic data set as CSV files, semantic IDs fitted on it, and a generator trained on it, once for all tests."""

from types import SimpleNamespace

import pytest

import onerec_hf.workflows.training
from tests.cli.commands import CODES, TINY, interaction_rows, item_rows, onerec, succeeded, write_csv


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """`interactions` and `items`: paths of CSV files; `options`: the command line that names them."""
    folder = tmp_path_factory.mktemp("data")
    interactions = write_csv(folder / "clicks.csv", interaction_rows())
    items = write_csv(folder / "products.csv", item_rows())
    return SimpleNamespace(
        interactions=interactions, items=items, options=["--interactions", interactions, "--items", items]
    )


@pytest.fixture(scope="session")
def semantic_ids(data, tmp_path_factory):
    """`folder` of fitted semantic IDs and `done`, the command that wrote it."""
    folder = tmp_path_factory.mktemp("fitted") / "ids"
    done = succeeded(onerec("semantic-ids", "fit", *data.options, *CODES, "--output_dir", folder))
    return SimpleNamespace(folder=folder, done=done)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """`folder` of a trained artefact, `done`, the command that wrote it, and `trainer`, with the model in memory."""
    folder = tmp_path_factory.mktemp("trained") / "shop"
    trainers = []

    def report(trainer, *args):
        trainers.append(trainer)
        return original(trainer, *args)

    original = onerec_hf.workflows.training.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onerec_hf.workflows.training, "report", report)
        done = succeeded(onerec("train", *data.options, *CODES, *TINY, "--output_dir", folder))
    return SimpleNamespace(folder=folder, done=done, trainer=trainers[0])
