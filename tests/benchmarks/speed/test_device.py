"""The script for accelerators in miniature: every row, the checks hold, and what there is no time for is told."""

import json

import pytest
import torch

from benchmarks.speed import device


def run(monkeypatch, tmp_path, *options):
    path = tmp_path / "device.json"
    monkeypatch.setattr("sys.argv", ["device.py", "--quick", "--device", "cpu", "--json", str(path), *options])
    device.main()
    found = json.loads(path.read_text())
    return {row["name"]: row["value"] for row in found["rows"]}, found


@pytest.mark.slow
def test_every_part_has_its_rows(monkeypatch, tmp_path):
    rows, found = run(monkeypatch, tmp_path)
    assert found["left_out"] == []
    assert found["device"] == "cpu"
    parts = [*dict.fromkeys(name.split("/")[0] for name in rows)]
    assert parts == ["machine", "check", "generate", "speedup", "train", "constraint", "semantic_ids"]
    for name in ("device_equals_cpu_float32", "compiled_equals_eager_float32"):
        assert rows[f"check/{name}/sessions"] == 1
        assert rows[f"check/{name}/scores"] < 1e-5
    shares = [value for name, value in rows.items() if name.endswith(("share_of_roofline", "mfu"))]
    assert len(shares) == 6
    assert all(0 < share < 1 for share in shares)
    assert max(value for name, value in rows.items() if name.endswith("largest_minus_smallest")) <= 1


def test_what_the_minutes_do_not_suffice_for_is_told(monkeypatch, tmp_path, capsys):
    rows, found = run(monkeypatch, tmp_path, "--minutes", "0")
    assert {name.split("/")[0] for name in rows} == {"machine", "check"}
    assert {"train/1b", "generate/0.1b/1x4x1"} <= set(found["left_out"])
    assert "left out for lack of time: generate/0.1b/1x4x1" in capsys.readouterr().err


@pytest.mark.slow
def test_many_shapes_may_be_compiled_in_turn(monkeypatch):
    """As on a GPU without --quick: more cells than torch compiles of one function."""
    bench = device.Bench("cpu", quick=True, minutes=5)
    bench.bandwidth, bench.gemm = 1e9, {torch.bfloat16: 1e9}
    monkeypatch.setattr(device, "CELLS", ((1, 4, 1), (2, 4, 2), (1, 8, 2)))
    bench.quick, bench.config = False, lambda size: device.OneRecConfig(codebook_sizes=[64] * 3, **device.TINY)
    monkeypatch.setattr(bench, "seconds", lambda run, *_, **__: [run() and 1.0])
    with torch._dynamo.config.patch(recompile_limit=3):
        device.generation(bench, "0.1b", bench.catalogue(500))
    assert len(bench.rows) == 4 * len(device.CELLS)


def test_a_part_that_fails_loses_no_rows(monkeypatch, tmp_path, capsys):
    def fails(bench, *_):
        raise RuntimeError("out of memory")

    for name in ("check", "generation", "against_transformers", "constraint", "semantic_ids"):
        monkeypatch.setattr(device, name, lambda *_: None)
    monkeypatch.setattr(device, "training", fails)
    rows, found = run(monkeypatch, tmp_path)
    assert "machine/copy" in rows
    assert found["left_out"] == [f"training/{size} (RuntimeError: out of memory)" for size in ("0.1b", "1b")]
