"""The recipe for a Ray cluster gives what `onerec-hf prepare` gives."""

import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from onerec_hf.data import ExampleSettings, PositiveFeedback, prepare_log
from tests.data.shards.test_write import write_log

RECIPE = Path(__file__).parents[3] / "examples" / "prepare_with_ray.py"


@pytest.fixture
def two_workers(monkeypatch, tmp_path_factory):
    # Workers import what this process imports, from this checkout.
    monkeypatch.setenv("PYTHONPATH", str(RECIPE.parents[1]))
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def by_user(files):
    """Rows in an order of their own: by user, then by length of the history."""
    rows = [row for file in files for row in pq.ParquetFile(file).read(["user_id", "history", "session"]).to_pylist()]
    return sorted(rows, key=lambda row: (row["user_id"], len(row["history"]), row["history"], row["session"]))


@pytest.mark.slow
def test_ray_gives_the_same_examples(two_workers, tmp_path):
    raw, _ = write_log(tmp_path / "raw", rows=900)
    settings, liked = ExampleSettings(session_length=3, max_history=6), PositiveFeedback({"like": 1})
    prepare_log(raw, tmp_path / "ready", positive=liked, settings=settings, num_shards=2)
    recipe = runpy.run_path(str(RECIPE))
    recipe["prepare_with_ray"](str(raw), str(tmp_path / "by-ray"), liked, settings, buckets=4)
    for split, files in (
        ("train", (tmp_path / "ready").glob("train-*.parquet")),
        ("validation", [tmp_path / "ready" / "validation.parquet"]),
        ("test", [tmp_path / "ready" / "test.parquet"]),
    ):
        found, expected = by_user((tmp_path / "by-ray" / f"split={split}").glob("*.parquet")), by_user(files)
        assert len(expected) >= 30
        assert found == expected
