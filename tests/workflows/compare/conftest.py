"""A table of 40 items and 60 users as CSV files, families that take a moment, and a comparison of them, once for all tests."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from onerec_hf.workflows import DataSettings
from onerec_hf.workflows.compare import compare_models

FAMILIES = {
    "popularity": "title: Popularity\nkind: ranking\nsettings: {model: popularity}\n",
    "item_knn": "title: Item-kNN\nkind: ranking\nsettings: {model: item_knn}\nspace: {last_n: [1, null]}\nfirst: {last_n: 1}\n",
    "sasrec": (
        "title: SASRec\nkind: sequential\nsettings: {architecture: sasrec, hidden_size: 8, num_train_epochs: 2, use_cpu: true}\n"
        "space: {learning_rate: {low: 0.001, high: 0.01, log: true}}\n"
    ),
    "broken": "title: Broken\nkind: sequential\nsettings: {architecture: lstm}\nspace: {learning_rate: [0.1]}\n",
    "texts": "title: Texts\nextends: sasrec\nneeds_content: true\nsettings: {features: content}\n",
}


def write_table(folder, users=60, items=40):
    """A walk through the items for each user; the path of the table."""
    rng, path = np.random.default_rng(0), folder / "walks.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for user in range(users):
            item = int(rng.integers(items))
            for time in range(10):
                writer.writerow([f"u{user}", f"i{item}", time])
                item = (item + int(rng.integers(1, 4))) % items
    return path


@pytest.fixture(scope="session")
def spaces(tmp_path_factory):
    """The folder of FAMILIES."""
    folder = tmp_path_factory.mktemp("spaces")
    for name, text in FAMILIES.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def compared(tmp_path_factory, spaces):
    """`found`, the comparison of FAMILIES with two trials; `data` and `options`, with which it was called."""
    folder = tmp_path_factory.mktemp("compared")
    data = DataSettings(interactions=str(write_table(folder)))
    options = {"output_dir": str(folder / "out"), "spaces": str(spaces), "trials": 2, "seeds": [0, 1], "jobs": 2}
    return SimpleNamespace(found=compare_models(data, **options), data=data, options=options)
