"""
Semantic IDs fitted by two ranks, compared with one process: CPU time and peak memory of a rank, equal codes, error. Includes codes, uniqueness,
report and catalogue; each rank reads its rows of a .npy file.

    python benchmarks/speed/semantic_ids_ranks.py --json benchmarks/results/semantic_ids_ranks.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/semantic_ids_ranks.py`

from benchmarks.harness import cpu_seconds, finish, parser, peak_gib, ratio_row, say
from benchmarks.speed.semantic_ids import clustered
from onerec_hf.evaluation.results import result_row
from onerec_hf.semantic_ids import Ranks, fit_semantic_ids


def fit(folder: str, clusters: int) -> None:
    """One rank's part, or all of it without torchrun; writes what it took beside the embeddings."""
    torch.set_num_threads(1)
    ranks = None
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        ranks = Ranks()
    vectors = np.load(f"{folder}/vectors.npy", mmap_mode="r")
    mine = slice(None) if ranks is None else ranks.share(len(vectors))
    rows, ids = np.array(vectors[mine]), np.arange(len(vectors))[mine]
    base = peak_gib()
    cpu, wall = cpu_seconds(), time.perf_counter()
    fitted = fit_semantic_ids(ids, rows, [clusters] * 3, ranks=ranks)
    took = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "peak": peak_gib(), "before": base}
    for low, high in fitted.report.cluster_sizes[:2]:
        assert high - low <= 1
    took["error"] = fitted.report.reconstruction_error[-1]
    rank = 0 if ranks is None else ranks.rank
    if rank == 0:
        np.save(f"{folder}/codes-{0 if ranks is None else ranks.size}.npy", fitted.catalogue.codes)
    with open(f"{folder}/took-{rank}.json", "w") as file:
        json.dump(took, file)
    if ranks is not None:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run(folder: str, clusters: int, size: int) -> list[dict[str, float]]:
    """What each rank took."""
    launch = [sys.executable]
    if size > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    subprocess.run(
        [*launch, __file__, "--fit", folder, str(clusters)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    took = []
    for rank in range(size):
        with open(f"{folder}/took-{rank}.json") as file:
            took.append(json.load(file))
    return took


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--fit", nargs=2, help="(used by the benchmark itself)")
    options = options.parse_args()
    if options.fit:
        return fit(options.fit[0], int(options.fit[1]))
    count, clusters, repetitions = (20_000, 128, 1) if options.quick else (200_000, 256, 2)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/vectors.npy", clustered(count, 128, count // 20).numpy())
        took: dict[int, list[list[dict[str, float]]]] = {1: [], 2: []}
        for _ in range(repetitions):
            for size in took:
                took[size].append(run(folder, clusters, size))
                say(f"{size} processes: {took[size][-1]}")
        equal = (np.load(f"{folder}/codes-0.npy") == np.load(f"{folder}/codes-2.npy")).all(1).mean()
    cpu = {size: [max(rank["cpu"] for rank in ranks) for ranks in runs] for size, runs in took.items()}
    wall = {size: [max(rank["wall"] for rank in ranks) for ranks in runs] for size, runs in took.items()}
    peak = {size: max(rank["peak"] for ranks in runs for rank in ranks) for size, runs in took.items()}
    named = {"ranks_2": cpu[2], "one": cpu[1]}
    rows = [
        ratio_row("ranks_2_cpu_of_a_rank_over_one", named, "ranks_2", "one"),
        ratio_row("ranks_2_wall_over_one", {"ranks_2": wall[2], "one": wall[1]}, "ranks_2", "one"),
        result_row("one_cpu", statistics.median(cpu[1]), "s"),
        result_row("one_wall", statistics.median(wall[1]), "s"),
        result_row("one_peak", peak[1], "GiB"),
        result_row("ranks_2_peak_of_a_rank", peak[2], "GiB", against="one_peak"),
        result_row("before_fit_peak", took[1][0][0]["before"], "GiB"),
        result_row("ranks_2_equal_codes", float(equal), "share", against="one"),
        result_row("ranks_2_error_over_one", took[2][0][0]["error"] / took[1][0][0]["error"], "ratio", against="one"),
    ]
    finish(rows, options.json, items=count, dimensions=128, codebook_sizes=[clusters] * 3, threads="one a process")


if __name__ == "__main__":
    main()
