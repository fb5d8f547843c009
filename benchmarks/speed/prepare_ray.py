"""
`prepare --engine ray` on Ray's local cluster beside polars: CPU and wall seconds, memory of a worker, and what they give for a billion rows.

The log is that of `prepare.py` in eight files (4 million rows, or `--rows`). Runs are interleaved. CPU seconds of Ray are those of its workers and of the
command; its other processes are left out. Both engines' files are compared.

Rows `plan/...` are no measurements: they extrapolate in proportion from the rows above them to a billion rows, with buckets of the same size.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/prepare_ray.py`

from benchmarks.harness import cpu_seconds, finish, parser, say
from benchmarks.speed import prepare
from onerec_hf.evaluation.results import result_row

BILLION, FILES = 10**9, 8


def workers() -> dict[int, tuple[float, float]]:
    """CPU seconds and peak GiB of each Ray worker of this process."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::") or "ray::" in "".join(process.cmdline()[:1]):
            times = process.cpu_times()
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
            found[process.pid] = (times.user + times.system, peak / 2**20)
    return found


def run(engine: str, log: Path, ready: Path, rows_per_bucket: int) -> tuple[float, float]:
    """CPU and wall seconds."""
    from onerec_hf.data import ExampleSettings, PositiveFeedback, prepare_log

    before, cpu, wall = workers(), cpu_seconds(), time.perf_counter()
    settings = ExampleSettings(stride=prepare.STRIDE)
    positive = PositiveFeedback({"like": 1})
    prepare_log(log, ready, positive=positive, settings=settings, rows_per_bucket=rows_per_bucket, engine=engine)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return cpu + sum(seconds - before.get(pid, (0.0, 0.0))[0] for pid, (seconds, _) in workers().items()), wall


def main() -> None:
    import ray

    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, help="rows of the log (4,000,000)")
    args = arguments.parse_args()
    rows = args.rows or (200_000 if args.quick else 4_000_000)
    scratch = Path(tempfile.mkdtemp(prefix="prepare-"))
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    seconds: dict[str, list[tuple[float, float]]] = {"polars": [], "ray": []}
    try:
        say(f"making {rows:,} rows up")
        prepare.SHARD_ROWS = rows // FILES
        prepare.make_log(scratch / "log", rows)
        (scratch / "log" / "_rows.json").unlink()
        for _ in range(1 if args.quick else 3):
            for engine, found in seconds.items():
                shutil.rmtree(scratch / engine, ignore_errors=True)
                found.append(run(engine, scratch / "log", scratch / engine, rows // 2))
                say(f"{engine}: {found[-1][0]:.1f} CPU s, {found[-1][1]:.1f} s")
        files = {engine: {path.name: path.read_bytes() for path in (scratch / engine).iterdir()} for engine in seconds}
        if files["polars"] != files["ray"]:
            raise AssertionError("the engines write different files")
        peak = max(peak for _, peak in workers().values())
    finally:
        ray.shutdown()
        shutil.rmtree(scratch)
    table = [result_row("rows", rows, "rows")]
    for engine, found in seconds.items():
        for place, name in enumerate(("cpu_seconds", "seconds")):
            each = [pair[place] for pair in found]
            table.append(result_row(f"{engine}/{name}", statistics.median(each), "s", spread=[min(each), max(each)]))
    ratios = [mine[0] / other[0] for mine, other in zip(seconds["ray"], seconds["polars"], strict=True)]
    cpu = statistics.median(pair[0] for pair in seconds["ray"])
    table += [
        result_row("ray/cpu_over_polars", statistics.median(ratios), "ratio", "polars", [min(ratios), max(ratios)]),
        result_row("ray/worker_peak", peak, "GiB"),
        result_row("plan/rows", BILLION, "rows"),
        result_row("plan/cpu_hours", cpu * BILLION / rows / 3600, "h"),
    ]
    finish(table, args.json, ray=ray.__version__, extrapolated=["plan/cpu_hours"])


if __name__ == "__main__":
    main()
