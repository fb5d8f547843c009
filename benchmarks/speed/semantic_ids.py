"""
Semantic IDs: balanced k-means compared with faiss's plain k-means and the paper's greedy algorithm, encoding compared with faiss's exact search,
a million items through three levels, a catalogue of ten million.

    python benchmarks/speed/semantic_ids.py --json benchmarks/results/semantic_ids.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/semantic_ids.py`

from benchmarks.harness import cpu_seconds, finish, interleaved, one_thread, parser, peak_gib, ratio_row, say
from onerec_hf import ItemCatalogue
from onerec_hf.evaluation.results import result_row
from onerec_hf.semantic_ids import BalancedKMeans, ResidualQuantizer, make_unique


def clustered(count: int, dim: int, groups: int, seed: int = 0) -> torch.Tensor:
    """(count, dim) points around `groups` centers of very unequal popularity."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(groups, dim, generator=generator) / dim**0.5
    weights = torch.rand(groups, generator=generator) ** 2 + 1e-3
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    return means[which] + 0.6 * torch.randn(count, dim, generator=generator) / dim**0.5


def faiss_kmeans(points: torch.Tensor, clusters: int, iterations: int = 20):
    kmeans = faiss.Kmeans(
        points.shape[1], clusters, niter=iterations, seed=0, min_points_per_centroid=1, max_points_per_centroid=10**9
    )
    kmeans.train(points.numpy())
    return kmeans


def against_faiss(count: int, clusters: int, repetitions: int) -> list[dict]:
    """The same points, iterations and threads; every point in every iteration on both sides, no early stop."""
    points, errors = clustered(count, 128, max(50, count // 100)), {}

    def balanced():
        kmeans = BalancedKMeans(clusters, tol=0, max_points_per_cluster=None).fit(points)
        counts = kmeans.labels_.bincount(minlength=clusters)
        assert int(counts.max() - counts.min()) <= 1
        errors["balanced"] = kmeans.inertia_

    def plain():
        kmeans = faiss_kmeans(points, clusters)
        errors["faiss"] = float(kmeans.index.search(points.numpy(), 1)[0].mean())

    cpu, wall = interleaved({"balanced": balanced, "faiss": plain}, repetitions)
    say(f"{count:,} x 128, K={clusters}: CPU s {cpu}, wall s {wall}, mean squared error {errors}")
    name = f"balanced_100k_k{clusters}"
    return [
        ratio_row(f"{name}_time_over_faiss", cpu, "balanced", "faiss"),
        result_row(f"{name}_cpu_time", statistics.median(cpu["balanced"]), "s"),
        result_row(
            f"{name}_error_over_faiss", errors["balanced"] / errors["faiss"], "ratio", against="faiss, unbalanced"
        ),
    ]


def against_greedy(sets: dict[str, tuple[torch.Tensor, int]]) -> list[dict]:
    """Mean squared error over that of Algorithm 1, 20 iterations each; below one means better."""
    ratios = {}
    for name, (points, clusters) in sets.items():
        errors = [BalancedKMeans(clusters, assignment=kind).fit(points).inertia_ for kind in ("optimal", "greedy")]
        ratios[name] = errors[0] / errors[1]
        say(f"{name}, K={clusters}: mean squared error {errors[0]:.4f}, greedy {errors[1]:.4f}")
    rows = [
        result_row(f"error_over_greedy/{name}", ratio, "ratio", against="greedy") for name, ratio in ratios.items()
    ]
    worst, values = max(ratios.values()), list(ratios.values())
    return [result_row("error_over_greedy", worst, "ratio", against="greedy", spread=[min(values), worst]), *rows]


def encode(count: int, clusters: int, repetitions: int) -> list[dict]:
    """Nearest codes of new items on one level, beside an exact faiss index over the same centroids."""
    points = clustered(count, 128, 500)
    quantizer = ResidualQuantizer([clusters], max_iter=2).fit(points[: 20 * clusters])
    index = faiss.IndexFlatL2(128)
    index.add(quantizer.codebooks_[0].numpy())
    runs = {"encode": lambda: quantizer.encode(points), "faiss": lambda: index.search(points.numpy(), 1)}
    cpu, _ = interleaved(runs, repetitions)
    agreed = float((quantizer.encode(points)[:, 0].numpy() == index.search(points.numpy(), 1)[1][:, 0]).mean())
    say(f"encoding {count:,} x 128, K={clusters}: CPU s {cpu}, the same code for {agreed:.3%}")
    return [ratio_row("encode_over_faiss", cpu, "encode", "faiss")]


def levels(count: int, clusters: int) -> None:
    """Three levels and unique codes in a separate process, to measure its peak memory; prints seconds and GiB."""
    points = clustered(count, 128, max(50, count // 20))
    wall, cpu = time.perf_counter(), cpu_seconds()
    quantizer = ResidualQuantizer([clusters] * 3).fit(points)
    fitted = time.perf_counter() - wall
    for column in quantizer.codes_.unbind(1):
        sizes = column.bincount(minlength=clusters)
        assert int(sizes.max() - sizes.min()) <= 1
    unique = make_unique(quantizer.codes_, *quantizer.last_level(points, quantizer.codes_))
    collisions = count - len(torch.unique(quantizer.codes_, dim=0))
    say(
        f"{count:,} x 128, 3 levels of {clusters}: fit {fitted:.0f} s, with unique codes {time.perf_counter() - wall:.0f} s wall, "
        f"{cpu_seconds() - cpu:.0f} s CPU, {collisions:,} collisions, {int(unique.moved.sum()):,} items moved"
    )
    print(time.perf_counter() - wall, cpu_seconds() - cpu, peak_gib())


def million(count: int, clusters: int) -> list[dict]:
    def measure(items: int) -> list[float]:
        command = [sys.executable, __file__, "--levels", str(items), str(clusters)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return [float(value) for value in done.stdout.split()]

    small, large = measure(count // 10), measure(count)
    return [
        result_row("fit_1m_peak", large[2], "GiB"),
        result_row("fit_1m_wall", large[0], "s"),
        result_row("fit_1m_cpu", large[1], "s"),
        result_row("fit_1m_over_100k", large[1] / small[1], "ratio", against="a tenth of the items"),
    ]


def catalogue(count: int) -> list[dict]:
    """A catalogue on disk: loading it, and a million lookups each way."""
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(count), (256, 256, 256)), axis=1)
    wanted = np.random.default_rng(1).integers(0, count, min(count, 1_000_000)) * 3
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "catalogue.safetensors")
        ItemCatalogue(np.arange(count) * 3, codes, [256, 256, 256]).save(path)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            loaded = ItemCatalogue.load(path)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        rows = loaded.indices(wanted)
        to_codes = time.perf_counter() - start
        assert np.array_equal(rows * 3, wanted)
        wanted = torch.from_numpy(np.array(loaded.codes[rows], dtype=np.int64))
        start = time.perf_counter()
        back = loaded.indices_of_codes(wanted)
        to_ids = time.perf_counter() - start
        assert np.array_equal(back.numpy(), rows)
    return [
        result_row("catalogue_10m_load", statistics.median(times), "s", spread=[min(times), max(times)]),
        result_row("catalogue_10m_million_ids_to_rows", to_codes, "s"),
        result_row("catalogue_10m_million_codes_to_rows", to_ids, "s"),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--data_dir", default="../shared/data/amazon_beauty", help="adds the Beauty embeddings to the sets"
    )
    options.add_argument("--levels", nargs=2, type=int, help="(used by the benchmark itself)")
    options = options.parse_args()
    if options.levels:
        return levels(*options.levels)
    one_thread()
    quick = options.quick
    sets = {"mixture_12k": (clustered(1200 if quick else 12_000, 128, 100), 32 if quick else 256)}
    beauty = os.path.join(options.data_dir, "minilm_l6_v2_f16.npy")
    if os.path.exists(beauty) and not quick:
        vectors = torch.from_numpy(np.load(beauty).astype(np.float32))
        first = BalancedKMeans(256).fit(vectors)
        sets["beauty_minilm"] = (vectors, 256)
        sets["beauty_minilm_residuals"] = (vectors - first.cluster_centers_[first.labels_], 256)
    rows = []
    for clusters in (256, 1024):
        rows += against_faiss(5_000 if quick else 100_000, clusters, 1 if quick else 3)
    rows += against_greedy(sets)
    rows += encode(20_000 if quick else 200_000, 1024, 3 if quick else 5)
    rows += million(20_000 if quick else 1_000_000, 128 if quick else 1024)
    rows += catalogue(200_000 if quick else 10_000_000)
    finish(rows, options.json, threads="one; fit_1m as many as torch takes")


if __name__ == "__main__":
    main()
