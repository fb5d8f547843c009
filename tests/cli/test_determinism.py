"""The same seed on the same machine gives the same files, byte for byte, in processes whose hashes differ."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.commands import CODES, TINY, interaction_rows, item_rows, rated_rows, write_csv

TIMES = {"seconds"}  # of results.json: what a run took
# What says when, where and with which command a file was made.
PLACES = ("README.md", "results.json")


def run(hash_seed: int, *argv, threads: int = 1, stdin: str = "") -> str:
    """The output of `onerec-hf ARGV...` in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "onerec_hf.cli.main", *map(str, argv)]
    done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_twice(arguments: Callable[[int], list], **settings) -> list[str]:
    """The outputs of two processes at the same time, of hash seeds 1 and 2: `onerec-hf ARGUMENTS(SEED)...`"""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda seed: run(seed, *arguments(seed), **settings), (1, 2)))


def files(folder: Path) -> dict[str, object]:
    """Every file of an artefact, and of the results everything but times and places."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "results.json":
            found[name] = [row for row in json.loads(path.read_text())["rows"] if row["name"] not in TIMES]
        elif path.suffix == ".html":  # a page is named after its folder
            found[name] = path.read_text(encoding="utf-8").replace(folder.name, "FOLDER")
        elif path.is_file() and path.name not in PLACES and path.suffix != ".png":
            found[name] = path.read_bytes()
    return found


def same(first: Path, second: Path, *expected: str) -> None:
    one, other = files(first), files(second)
    assert set(expected) <= set(one)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("determinism")
    write_csv(folder / "clicks.csv", interaction_rows())
    write_csv(folder / "products.csv", item_rows())
    header, *rows = interaction_rows()
    shown = [[*header, "like"], *([*row, int(row[1][1:]) % 3 == 0] for row in rows)]
    write_csv(folder / "shown.csv", [[*row[:3], int(row[3])] if row[3] != "like" else row for row in shown])
    return folder


@pytest.fixture(scope="module")
def data(work):
    return ["--interactions", work / "clicks.csv", "--items", work / "products.csv"]


@pytest.fixture(scope="module")
def trained(work, data):
    run_twice(lambda seed: ["train", *data, *CODES, *TINY, "--output_dir", work / f"shop{seed}"])
    return work / "shop1", work / "shop2"


@pytest.fixture(scope="module")
def judges(work):
    options = ["--impressions", work / "shown.csv", "--objectives", "ltr=like", "--history_end", "500"]
    options += ["--validation_start", "1500", "--test_start", "2200", "--min_items", "1", "--max_items", "4"]
    options += ["--hidden_size", "8", "--intermediate_size", "8", "--num_attention_heads", "2", "--max_steps", "3"]
    run_twice(lambda seed: ["reward", *options, "--use_cpu", "true", "--output_dir", work / f"judge{seed}"])
    return work / "judge1", work / "judge2"


@pytest.mark.slow
def test_semantic_ids(work, data):
    fit = ["semantic-ids", "fit", *data, *CODES, "--output_dir"]
    run(1, *fit, work / "ids1", threads=1)
    run(2, *fit, work / "ids2", threads=2)
    same(
        work / "ids1",
        work / "ids2",
        "catalogue.safetensors",
        "codebooks.safetensors",
        "semantic_ids.json",
        "items.parquet",
    )


@pytest.mark.slow
def test_train(trained):
    same(
        *trained, "model.safetensors", "catalogue.safetensors", "codebooks.safetensors", "results.json", "config.json"
    )


@pytest.mark.slow
def test_reward(judges):
    same(*judges, "model.safetensors", "reward_items.safetensors", "results.json")


@pytest.mark.slow
def test_align(work, data, trained, judges):
    sizes = ["--max_steps", "2", "--max_examples", "20", "--dpo_ratio", "0.5", "--num_candidates", "4"]
    sizes += ["--use_cpu", "true", "--bf16", "false"]
    options = ["--model", trained[0], "--reward", judges[0], *data[:2], *sizes]
    run_twice(lambda seed: ["align", *options, "--output_dir", work / f"aligned{seed}"])
    same(work / "aligned1", work / "aligned2", "model.safetensors", "pairs/pairs.parquet", "results.json")


@pytest.mark.slow
def test_evaluate_and_recommend(work, data, trained):
    histories = "".join(json.dumps([f"m{i}", f"m{i + 1}"]) + "\n" for i in range(10))
    options = ["--model", trained[0], "--top_k", "3", "--session_length", "2"]
    answers = run_twice(lambda _: ["recommend", *options], stdin=histories)
    assert answers[0] == answers[1]
    folders = [work / f"evaluated{seed}" for seed in (1, 2)]
    for folder in folders:
        folder.mkdir()
    run_twice(lambda seed: ["evaluate", "--model", trained[0], *data, "--json", folders[seed - 1] / "results.json"])
    assert files(folders[0]) == files(folders[1])


@pytest.mark.slow
def test_quickstart(work):
    rated = write_csv(work / "rated.csv", rated_rows())
    options = ["--interactions", rated, "--max_steps", "2"]
    run_twice(lambda seed: ["quickstart", *options, "--output_dir", work / f"quick{seed}"])
    same(work / "quick1", work / "quick2", "model.safetensors", "aligned/model.safetensors", "results.json")


@pytest.mark.slow
def test_prepare(work, data):
    options = ["--num_shards", "4", "--rows_per_bucket", "60"]
    run_twice(lambda seed: ["prepare", *data[:2], *options, "--output_dir", work / f"prepared{seed}"])
    same(work / "prepared1", work / "prepared2", "prepared.json")


@pytest.mark.slow
def test_export(work, trained):
    run_twice(lambda seed: ["export", "--model", trained[0], "--output_dir", work / f"graphs{seed}"])
    same(work / "graphs1", work / "graphs2", "encoder.onnx", "decoder.onnx")
