"""
One accelerator in one command of at most eight minutes: is it right (the GPU tests, CUDA against CPU, bfloat16 against float32, compiled against eager),
and how fast are generation, training and semantic IDs on it.

    python benchmarks/speed/device.py --json benchmarks/results/device.json

Everything is warmed up, times are medians of synchronised wall seconds. The models are those of recipes/scale with random weights (three levels of 8,192 codes, 24
experts, top-2), histories of 64 items (256 tokens), a million items. Rows:

    machine/copy, machine/gemm_*        GB/s read and written by a copy of 1 GiB, TFLOP/s of a product of 8192 x 8192 matrices
    check/*                             shares of equal sessions, and the largest difference of scores relative to the largest score
    generate/MODEL/USERSxBEAMSxITEMS/*  eager and compiled ("reduce-overhead": CUDA graphs) seconds of `recommend()`, users a second of the faster one, and
                                        share_of_roofline: max(bytes / copy rate, FLOPs / bfloat16 rate) over its time. Bytes: all decoder weights and the
                                        history's keys and values once a step, the sessions' as far as they are written. FLOPs: `planning.forward_flops`
    speedup/USERSxBEAMS_over_*          time of transformers' search over that of `recommend()`: with `prefix_allowed_tokens_fn`, and without a constraint
    constraint/10m_items                time of `recommend()` with 10 million items over the same search with a catalogue of full levels, minus one
    train/MODEL/*                       bfloat16 autocast, AdamW, windows: tokens and targets a second, GiB, MFU = `planning.step_flops` / time / bfloat16 rate
    semantic_ids/*                      seconds and GiB of balanced k-means, three levels of 8,192, and how far its clusters differ in size

What the minutes do not suffice for is left out and told. `--quick` has the same rows in miniature, on a CPU too.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/device.py`

import torch
from transformers import CompileConfig

from benchmarks.harness import RECIPES, finish, parser, say
from benchmarks.speed.constraint import random_codes
from benchmarks.speed.semantic_ids import clustered
from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.evaluation.results import result_row
from onerec_hf.planning import Batch
from onerec_hf.planning.compute import forward_flops, step_flops
from onerec_hf.semantic_ids import ResidualQuantizer

CELLS = tuple(itertools.product((1, 8, 32, 128), (128, 512), (1, 5)))
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
}


def arguments():
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=8, help="what is not begun by then is left out")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options.parse_args()


class Bench:
    """What all parts share: the device, its measured rates, the deadline and the rows."""

    def __init__(self, device: str, quick: bool, minutes: float):
        self.device, self.quick, self.rows = torch.device(device), quick, []
        self.deadline, self.left_out = time.monotonic() + 60 * minutes, []
        self.codes = 64 if quick else 8192
        self.history, self.items = (8, 2_000) if quick else (64, 1_000_000)

    def add(self, name: str, value: float, unit: str, **more) -> None:
        self.rows.append(result_row(name, value, unit, **more))
        say(f"{name} {value:.4g} {unit}")

    def late(self, name: str) -> bool:
        """Whether the time is up; then the part is noted as left out."""
        if time.monotonic() > self.deadline:
            self.left_out.append(name)
            return True
        return False

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repetitions: int = 5, warm: int = 2) -> list[float]:
        """Sorted wall seconds after `warm` runs; long ones are repeated less often."""
        times, (repetitions, warm) = [], (1, 1) if self.quick else (repetitions, warm)
        for repetition in range(warm + repetitions):
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
            if repetition >= warm and sum(times[warm:]) > 4:
                break
        return sorted(times[warm:])

    def peak(self, run: Callable[[], Any]) -> float:
        """GiB at the peak of a run on a GPU; 0 on a CPU, where torch does not count."""
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30

    def measure_rates(self) -> None:
        """The copy bandwidth in bytes/s and the rates of matrix products in FLOP/s."""
        size = 1 << (20 if self.quick else 30)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * size / self.seconds(lambda: target.copy_(source))[0]
        self.add("machine/copy", self.bandwidth / 1e9, "GB/s")
        side = 256 if self.quick else 8192
        self.gemm = {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            self.gemm[dtype] = 2 * side**3 / self.seconds(lambda a=a, b=b: a @ b)[0]
            self.add(f"machine/gemm_{str(dtype).removeprefix('torch.')}", self.gemm[dtype] / 1e12, "TFLOP/s")

    def config(self, size: str) -> OneRecConfig:
        """That of a recipe of recipes/scale; in miniature with --quick."""
        import yaml

        recipe = yaml.safe_load((RECIPES / "scale" / f"{size}.yaml").read_text())
        shape: dict[str, Any] = TINY if self.quick else {name: recipe[name] for name in TINY}
        return OneRecConfig(codebook_sizes=[self.codes] * 3, session_length=5, dropout_rate=0.0, **shape)

    def catalogue(self, items: int) -> ItemCatalogue:
        return ItemCatalogue(np.arange(items), random_codes(items, self.codes), [self.codes] * 3)

    def model(self, size: str, catalogue: ItemCatalogue, dtype: torch.dtype) -> OneRecForConditionalGeneration:
        torch.manual_seed(0)
        model: Any = OneRecForConditionalGeneration(self.config(size)).eval()
        model.to(self.device, dtype)
        model.set_catalogue(catalogue)
        return model

    def requests(self, catalogue: ItemCatalogue, users: int) -> dict[str, torch.Tensor]:
        histories = np.random.default_rng(1).integers(0, len(catalogue), (users, self.history)).tolist()
        inputs = OneRecProcessor.from_catalogue(catalogue, self.history)(histories)
        return {name: value.to(self.device) for name, value in inputs.items()}


def answers(model: Any, inputs: dict[str, torch.Tensor], beams: int, items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences and float32 scores on the CPU."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    out = model.recommend(
        **inputs,
        num_beams=beams,
        num_return_sequences=beams,
        session_length=items,
        return_dict_in_generate=True,
    )
    return out.sequences.cpu(), out.sequences_scores.float().cpu()


def check(bench: Bench) -> None:
    """Shares of equal sessions and differences of scores, for a small model whose weights are large enough that its choices are clear."""
    catalogue = bench.catalogue(2_000)
    torch.manual_seed(0)
    config = OneRecConfig(codebook_sizes=[bench.codes] * 3, initializer_range=0.1, **TINY)
    reference = OneRecForConditionalGeneration(config).eval()
    reference.set_catalogue(catalogue)
    inputs = bench.requests(catalogue, 8)
    expected, scores = answers(reference, inputs, 32, 2)
    on_device: Any = OneRecForConditionalGeneration(config).eval()
    on_device.load_state_dict(reference.state_dict())
    on_device.set_catalogue(catalogue)
    for name, dtype, compiled in (
        ("device_equals_cpu_float32", torch.float32, None),
        ("compiled_equals_eager_float32", torch.float32, compile_config(bench)),
        ("bfloat16_equals_float32", torch.bfloat16, None),
    ):
        on_device.to(bench.device, dtype)
        on_device.generation_config.compile_config = compiled
        found, theirs = answers(on_device, inputs, 32, 2)
        bench.add(f"check/{name}/sessions", float((found == expected).all(1).float().mean()), "share")
        difference = float((theirs - scores).abs().max() / scores.abs().max())
        bench.add(f"check/{name}/scores", difference, "relative difference")


def compile_config(bench: Bench) -> CompileConfig:
    """CUDA graphs on a GPU; on a CPU the same static steps without a compiler."""
    if bench.device.type == "cuda":
        return CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    return CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)  # pyright: ignore[reportArgumentType]


def roofline(bench: Bench, model: Any, users: int, beams: int, items: int) -> float:
    """The least seconds of a session's search: memory traffic or matrix products, whichever takes longer."""
    config, size = model.config, torch.finfo(model.dtype).bits // 8
    steps, levels = items * config.num_codebooks, config.num_codebooks
    decoder = sum(p.numel() for p in model.get_decoder().parameters()) * size
    keys = config.num_key_value_heads * config.head_dim
    history = 2 * keys * config.decoder_layers * users * bench.history * config.tokens_per_item * size
    # A step reads what the steps before it wrote.
    written = 2 * keys * config.decoder_layers * users * beams * size * sum(range(steps)) * (levels + 1) / levels
    encoder = sum(p.numel() for p in model.get_encoder().parameters()) * size
    traffic = encoder + steps * (decoder + history) + written
    flops = forward_flops(config, Batch(users, bench.history, 1)) + users * beams * (
        forward_flops(config, Batch(1, bench.history, items)) - forward_flops(config, Batch(1, bench.history, 0))
    )
    return max(traffic / bench.bandwidth, flops / bench.gemm[model.dtype])


def generation(bench: Bench, size: str, catalogue: ItemCatalogue) -> None:
    """The rows of generate/: eager and compiled, for the cells that time is left for."""
    model = bench.model(size, catalogue, torch.bfloat16)
    cells = ((1, 4, 1), (2, 4, 2)) if bench.quick else CELLS
    for users, beams, items in cells:
        name = f"generate/{size}/{users}x{beams}x{items}"
        if bench.late(name):
            continue
        torch.compiler.reset()  # each cell has shapes of its own, and only a few may be compiled
        inputs, best = bench.requests(catalogue, users), []
        for how, config in (("eager", None), ("compiled", compile_config(bench))):
            model.generation_config.compile_config = config
            # A compiled step is compiled in its first run and recorded in its second.
            found = bench.seconds(lambda i=inputs, b=beams, n=items: answers(model, i, b, n), 10, warm=3)
            bench.add(f"{name}/{how}", statistics.median(found), "s", spread=[found[0], found[-1]])
            best.append(statistics.median(found))
        bench.add(f"{name}/rate", users / min(best), "users/s")
        bench.add(f"{name}/share_of_roofline", roofline(bench, model, users, beams, items) / min(best), "share")


def against_transformers(bench: Bench, catalogue: ItemCatalogue) -> None:
    """`recommend()` against the search of transformers with the same weights; the peer runs few times, since it is slow."""
    from benchmarks.speed.generation import Setting

    users, beams = (2, 4) if bench.quick else (8, 128)
    if bench.late(f"speedup/{users}x{beams}"):
        return
    setting = Setting(bench.model("0.1b", catalogue, torch.bfloat16), catalogue, bench.history)
    setting.ask(users)
    runs = setting.runs(beams, 1)
    mine = statistics.median(bench.seconds(runs["recommend"]))
    for peer in ("prefix_fn", "unconstrained"):
        theirs = bench.seconds(runs[peer], repetitions=2, warm=1)
        bench.add(f"speedup/{users}x{beams}_over_{peer}", statistics.median(theirs) / mine, "ratio", against=peer)


def constraint(bench: Bench) -> None:
    """What a large catalogue adds to a search; the other one has as few items as fill every level's width."""
    if bench.late("constraint/10m_items"):
        return
    large, small = (20_000, 2_000) if bench.quick else (10_000_000, 100_000)
    users, beams, times = (2, 4, {}) if bench.quick else (8, 128, {})
    for items in (large, small):
        catalogue = bench.catalogue(items)
        model, inputs = bench.model("0.1b", catalogue, torch.bfloat16), bench.requests(catalogue, users)
        times[items] = statistics.median(bench.seconds(lambda m=model, i=inputs: answers(m, i, beams, 1), 10))
    bench.add("constraint/10m_items", times[large] / times[small] - 1, "share", against=f"{small:,} items")


def training(bench: Bench, size: str) -> None:
    """The rows of train/ for one size."""
    name = f"train/{size}"
    if bench.late(name):
        return
    config, users = bench.config(size), 4 if bench.quick else 256
    torch.manual_seed(0)
    model: Any = OneRecForConditionalGeneration(config).train()
    model.to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    catalogue = bench.catalogue(2_000)
    inputs, rng = bench.requests(catalogue, users), np.random.default_rng(2)
    sessions = rng.integers(0, len(catalogue), (users, config.session_length)).tolist()
    processor = OneRecProcessor.from_catalogue(catalogue, bench.history)
    batch = inputs | {"labels": processor([[0]] * users, sessions)["labels"].to(bench.device)}

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = bench.peak(step)
    seconds = statistics.median(bench.seconds(step))
    shape = Batch(users, bench.history, config.session_length)
    bench.add(f"{name}/tokens", sum(shape.tokens(config)) / seconds, "tokens/s")
    bench.add(f"{name}/targets", users * config.session_length / seconds, "items/s")
    # Of the fastest product: some CPUs multiply bfloat16 slower than float32.
    bench.add(f"{name}/mfu", step_flops(config, shape) / seconds / max(bench.gemm.values()), "share")
    bench.add(f"{name}/peak", peak, "GiB")


def semantic_ids(bench: Bench) -> None:
    """Balanced k-means of growing sets, as far as the time goes: each is expected to take ten times the one before it."""
    clusters = 16 if bench.quick else 8192
    taken = 0.0
    for label, count in (
        (("100k", 1_000), ("1m", 2_000))
        if bench.quick
        else (("100k", 100_000), ("1m", 1_000_000), ("10m", 10_000_000))
    ):
        name = f"semantic_ids/{label}"
        if time.monotonic() + 10 * taken > bench.deadline:
            bench.left_out.append(name)
            continue
        points = clustered(count, 128, max(50, count // 1000)).to(bench.device)
        quantizer = ResidualQuantizer([clusters] * 3)
        started = time.perf_counter()
        peak = bench.peak(lambda q=quantizer, p=points: q.fit(p))
        bench.wait()
        taken = time.perf_counter() - started
        sizes = [column.bincount(minlength=clusters) for column in quantizer.codes_.unbind(1)]
        bench.add(f"{name}/seconds", taken, "s")
        bench.add(f"{name}/peak", peak, "GiB")
        bench.add(f"{name}/largest_minus_smallest", max(int(s.max() - s.min()) for s in sizes), "items")


def gpu_tests(bench: Bench) -> None:
    """The tests that need a GPU, in a process of their own: passed ones over those that ran."""
    if bench.device.type != "cuda":
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/modeling", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    say(done.stdout[-2000:])
    bench.add("check/gpu_tests_pass", float(done.returncode == 0), "yes or no")


def main() -> None:
    options = arguments()
    bench = Bench(options.device, options.quick, options.minutes)
    torch.backends.cuda.matmul.allow_tf32 = False
    bench.measure_rates()
    catalogue = bench.catalogue(bench.items)
    parts: dict[str, Callable[[], None]] = {
        "gpu_tests": lambda: gpu_tests(bench),
        "check": lambda: check(bench),
        "generation/0.1b": lambda: generation(bench, "0.1b", catalogue),
        "against_transformers": lambda: against_transformers(bench, catalogue),
        "training/0.1b": lambda: training(bench, "0.1b"),
        "generation/1b": lambda: generation(bench, "1b", catalogue),
        "training/1b": lambda: training(bench, "1b"),
        "constraint": lambda: constraint(bench),
        "semantic_ids": lambda: semantic_ids(bench),
    }
    for name, part in parts.items():
        try:
            part()
        except Exception as error:  # what was measured before is worth the minutes that it took
            first_line = str(error).partition("\n")[0]
            bench.left_out.append(f"{name} ({type(error).__name__}: {first_line})")
            traceback.print_exc()
    if bench.left_out:
        say(f"left out for lack of time: {', '.join(bench.left_out)}")
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    finish(bench.rows, options.json, device=card, quick=bench.quick, left_out=bench.left_out, weights="random, seed 0")


if __name__ == "__main__":
    main()
