"""`prepare --engine ray`: the files that polars writes on one machine, byte for byte, whatever dies meanwhile."""

import contextlib
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from onerec_hf.data import DataError, ExampleSettings, PositiveFeedback, prepare_log, read_items, read_users
from onerec_hf.data.shards import cluster, folders
from onerec_hf.data.shards.features import LogFeatures
from tests.data.shards.test_features import NAMES, table
from tests.data.shards.test_write import write_log

SIZES = {"num_shards": 3, "rows_per_bucket": 150, "positive": PositiveFeedback({"like": 1})}


@pytest.fixture
def here(monkeypatch):
    """Tasks run in this process; returns what ran."""
    ran = []

    def tasks(run, scratch, stage, function, numbers, *args):
        for number in numbers:
            ran.append(f"{stage}-{number}")
            yield function(run, scratch, number, *args)

    monkeypatch.setattr(cluster.RayRun, "_tasks", tasks)
    monkeypatch.setattr(cluster, "_ray", contextlib.nullcontext)
    return ran


@pytest.fixture(scope="module")
def two_workers():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(cluster.__file__).parents[3]))  # workers import what this process imports
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared(raw, folder, features=lambda: None, **options):
    """The files of a run, or its error, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            prepare_log(raw, folder, features=features(), **(SIZES | options))
            result = contents(folder)
        except DataError as error:
            result = str(error)
    return result, [str(each.message) for each in caught]


def feature_log(folder, suffix):
    """A log in three files, some rows in two of them; its features."""
    tables = table()
    log = pd.concat([tables["interactions"], tables["interactions"].iloc[:40]]).assign(event=range(940))
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(log)), 3)):
        rows, path = log.iloc[part], folder / f"{number}.{suffix}"
        rows.to_csv(path, index=False) if suffix == "csv" else rows.to_json(path, orient="records", lines=True)
    return lambda: LogFeatures(NAMES, read_users(tables["users"]), read_items(tables["items"]), suffix == "csv")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_the_same_files(tmp_path, here, suffix):
    """Also with features, duplicates in several files, a column that numbers the rows, and prefixes; the warnings are the same."""
    options = {"settings": ExampleSettings(3, 2, 6, 1, "prefixes" if suffix == "csv" else "windows")}
    if suffix == "parquet":
        write_log(tmp_path / "raw")
    else:
        options["features"] = feature_log(tmp_path / "raw", suffix)
    expected, found = (
        prepared(tmp_path / "raw", tmp_path / engine, engine=engine, **options) for engine in ("polars", "ray")
    )
    assert len(expected[0]) == (8 if suffix == "parquet" else 9)
    assert found == expected
    assert len(expected[1]) == (suffix != "parquet")  # duplicates but for the number of the event
    assert {"part-0", "part-1", "part-2", "file-5"} <= set(here)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["polars", "raw", "ray"]


@pytest.mark.parametrize(
    "rows",
    [
        {"item_id": [1, None, 3, 4]},
        {"like": [1, 0, 1, "much"]},
        {"timestamp": [1, 2, 3, "soon"]},
        {"like": [0, 0, 0, 0]},
        {"when": [1, 2, 3, 4], "timestamp": None},
        {},
    ],
    ids=["null", "words", "times", "none", "column", "rare"],
)
def test_errors_are_the_same(tmp_path, here, rows):
    """Their row numbers count over all files; no folder stays."""
    log = {"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": [1, 2, 3, 4], "like": [1] * 4} | rows
    log = pd.DataFrame({name: values for name, values in log.items() if values is not None})
    (tmp_path / "raw").mkdir()
    for number in range(2):
        log[2 * number : 2 * number + 2].to_csv(tmp_path / "raw" / f"{number}.csv", index=False)
    expected, found = (prepared(tmp_path / "raw", tmp_path / engine, engine=engine) for engine in ("polars", "ray"))
    assert isinstance(expected[0], str)
    assert found == expected
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_file_that_is_cut_is_named(tmp_path, here, monkeypatch):
    monkeypatch.setattr("onerec_hf.data.shards.numbering._FIRST_ROWS", 20)
    raw, _ = write_log(tmp_path / "raw")
    (raw / "part-1.parquet").write_bytes((raw / "part-1.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-[01].parquet.*: cannot be read as parquet"):
        prepare_log(raw, tmp_path / "ray", engine="ray")


def test_a_file_of_other_types_is_read_as_the_first(tmp_path, here):
    """Duplicates agree in all columns, whatever the file's own types."""
    raw, rows = write_log(tmp_path / "raw", rows=200)
    again = rows.iloc[:20].astype({"like": "int8", "item_id": "int32"})
    again.to_parquet(raw / "part-9.parquet", index=False)
    (expected, _), (found, _) = (prepared(raw, tmp_path / engine, engine=engine) for engine in ("polars", "ray"))
    assert b'"repeated": 0' not in expected["prepared.json"]
    assert found == expected


@pytest.mark.parametrize("stage", ["part", "learn", "file"])
def test_a_killed_run_is_resumed(tmp_path, here, monkeypatch, stage):
    features = feature_log(tmp_path / "raw", "csv")
    expected, _ = prepared(tmp_path / "raw", tmp_path / "polars", features)
    tasks = cluster.RayRun._tasks

    def killed(run, scratch, name, function, numbers, *args):
        yield from tasks(run, scratch, name, function, numbers[:1] if name == stage else numbers, *args)
        if name == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(cluster.RayRun, "_tasks", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "raw", tmp_path / "ray", features, engine="ray")
    assert not (tmp_path / "ray").exists()
    monkeypatch.setattr(cluster.RayRun, "_tasks", tasks)
    first = [task for task in here if not task.startswith("learn")]
    here.clear()
    # Other settings, or a log that changed, begin anew.
    prepared(tmp_path / "raw", tmp_path / "ray", engine="ray", num_shards=2)
    assert "rows-0" in here
    here.clear()
    found, _ = prepared(tmp_path / "raw", tmp_path / "ray", features, engine="ray", overwrite=True)
    assert found == expected
    assert here
    assert not set(first) & set(here)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["polars", "raw", "ray"]


def test_a_run_that_was_killed_while_it_cleaned_up_is_repeated(tmp_path, here, monkeypatch):
    write_log(tmp_path / "raw")
    expected, _ = prepared(tmp_path / "raw", tmp_path / "polars")
    rmtree = cluster.shutil.rmtree

    def killed(folder, **options):
        if Path(folder).name.startswith("buckets"):
            for path in [*Path(folder).glob("*.train"), *Path(folder).glob("file-0.json")]:
                path.unlink()
            raise KeyboardInterrupt
        rmtree(folder, **options)

    monkeypatch.setattr(cluster.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")
    monkeypatch.setattr(cluster.shutil, "rmtree", rmtree)
    assert prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")[0] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["polars", "raw", "ray"]


def test_half_a_file_of_a_killed_worker_is_no_part_of_the_result(tmp_path, here, monkeypatch):
    write_log(tmp_path / "raw")
    expected, _ = prepared(tmp_path / "raw", tmp_path / "polars")
    new_parquet, joined = cluster.new_parquet, []

    def killed(path, schema):
        joined.append(path)
        path.with_name(f"{path.name}-half").write_bytes(b"PAR1")  # as nothing of a killed process removes it
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "new_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")
    monkeypatch.setattr(cluster, "new_parquet", new_parquet)
    assert joined
    assert prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")[0] == expected


def test_what_a_killed_run_left_of_the_earlier_folder_is_removed(tmp_path, here, monkeypatch):
    write_log(tmp_path / "raw")
    expected, _ = prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")
    rmtree = folders.shutil.rmtree

    def killed(folder, **options):
        if Path(folder).name.endswith("-earlier") and Path(folder).exists():
            raise KeyboardInterrupt
        rmtree(folder, **options)

    monkeypatch.setattr(folders.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "raw", tmp_path / "ray", engine="ray", overwrite=True)
    monkeypatch.setattr(folders.shutil, "rmtree", rmtree)
    assert prepared(tmp_path / "raw", tmp_path / "ray", engine="ray", overwrite=True)[0] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "ray"]


def test_workers_have_other_working_directories(tmp_path, here, monkeypatch):
    write_log(tmp_path / "raw")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    expected, _ = prepared("raw", tmp_path / "polars")
    tasks = cluster.RayRun._tasks

    def elsewhere(*args):
        with contextlib.chdir(tmp_path / "elsewhere"):
            yield from list(tasks(*args))

    monkeypatch.setattr(cluster.RayRun, "_tasks", elsewhere)
    assert prepared("raw", Path("ray"), engine="ray")[0] == expected


def test_a_run_of_another_version_of_polars_is_not_resumed(tmp_path, here, monkeypatch):
    """Its users are in other buckets."""
    import polars

    write_log(tmp_path / "raw")
    tasks = cluster.RayRun._tasks

    def killed(run, scratch, stage, *args):
        yield from tasks(run, scratch, stage, *args)
        if stage == "part":
            raise KeyboardInterrupt

    monkeypatch.setattr(cluster.RayRun, "_tasks", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")
    monkeypatch.setattr(cluster.RayRun, "_tasks", tasks)
    monkeypatch.setattr(polars, "__version__", "99.0.0")
    here.clear()
    prepared(tmp_path / "raw", tmp_path / "ray", engine="ray")
    assert "part-0" in here


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    write_log(tmp_path / "raw")
    with pytest.raises(ValueError, match="engine='spark' is unknown; choose polars or ray"):
        prepare_log(tmp_path / "raw", tmp_path / "ready", engine="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'not installed. Run: pip install "onerec-hf\[ray\]"$'):
        prepare_log(tmp_path / "raw", tmp_path / "ready", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.slow
def test_a_killed_worker_is_survived(two_workers, tmp_path):
    """On Ray's local cluster: the first workers that are seen at a task of each of three passes are killed."""
    features = feature_log(tmp_path / "raw", "jsonl")
    expected = prepared(tmp_path / "raw", tmp_path / "polars", features)
    killed, ended = [], threading.Event()

    def kill():
        while not ended.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = process.cmdline()[0] if process.cmdline() else ""
                    stage = title.removeprefix("ray::prepare-").split("-")[0]
                    if stage in ("part", "order", "cut") and stage not in killed:
                        process.kill()
                        killed.append(stage)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = prepared(tmp_path / "raw", tmp_path / "ray", features, engine="ray")
    finally:
        ended.set()
        killer.join()
    assert found == expected
    assert killed


@pytest.mark.slow
def test_errors_of_workers_are_those_of_the_data(two_workers, tmp_path):
    raw, _ = write_log(tmp_path / "raw", rows=30_000)
    pd.read_parquet(raw / "part-2.parquet").drop(columns="like").to_parquet(raw / "part-2.parquet")
    with pytest.raises(DataError, match=r"part-2.parquet: cannot be read as parquet.*like"):
        prepare_log(raw, tmp_path / "ray", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
