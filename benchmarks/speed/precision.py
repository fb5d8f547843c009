"""
Precision and products on a CPU: `recommend()` and training in float32 and bfloat16, what a small request is bound by, and what bfloat16 does to
rankings.

    python benchmarks/speed/precision.py --json benchmarks/results/precision.json
    python benchmarks/speed/precision.py --models runs/beauty runs/movielens --json benchmarks/results/precision_quality.json

d = 256, 4 + 4 layers, 24 experts, 50 items of history, 12,000 items, sessions of one item, experts packed; CPU seconds of one thread, in turns.

  default    float32, linear layers by torch's default product (MKL), as plain nn.Linear multiplies
  float32    float32 as it is: oneDNN where it is faster
  bfloat16   the same model in bfloat16

`speedup_UxB/X` is the time of `default` over that of X. `UxB/floor_ms` is what the request must take at least: the weights that its decoding steps read,
each step anew, over the measured bandwidth of one thread, and the operations of the encoder and of the history's keys and values over the fastest
measured product in that dtype.

`train/X` are targets per CPU second of full steps on Beauty's packed prefixes (benchmarks/speed/training.py); `bfloat16` is autocast, as `--bf16`.
`train/loss_gap` is the largest difference of the losses of float32 and bfloat16 over these steps, relative to the loss.

`expert_R/X`: microseconds of the first product of an expert (256 to 2048) with so many rows, 24 experts in turn so that weights are not in the
cache; `int8` is torchao's weight-only quantisation, where torchao is installed.

With `--models`, folders of generators that `train` wrote, only what bfloat16 does to their rankings: `quality/MODEL/recall@10/X` of `onerec-hf evaluate`, and
`quality/MODEL/WAY/...`, the shares of the first 3,000 test users with equal lists (the same ten items in the same order) and equal sets, ranked as the model
does by default and by the decoder alone (50 beams).
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/precision.py`

from benchmarks.harness import DATA, cpu_seconds, finish, interleaved, one_thread, parser, ratio_row, say
from benchmarks.speed.generation import HISTORY, Setting

CELLS = ((1, 10), (8, 50), (32, 128))


def by_default(run: Callable[[], Any]) -> Callable[[], None]:
    """The same computation with torch's default products of linear layers."""
    from torch import nn

    from onerec_hf.modeling.cpu_experts import OneRecLinear

    def patched() -> None:
        with patch.object(OneRecLinear, "forward", nn.Linear.forward):
            run()

    return patched


def fastest(run: Callable[[], Any], seconds: float = 0.2) -> float:
    """The shortest CPU time of a computation."""
    run()
    best, end = float("inf"), time.process_time() + seconds
    while time.process_time() < end:
        before = time.process_time()
        run()
        best = min(best, time.process_time() - before)
    return best


def recommendations(quick: bool) -> list[dict[str, Any]]:
    import torch

    from onerec_hf.evaluation.results import result_row

    setting = Setting(12_000, 256, quick)
    setting.peers = {}
    models = {"float32": setting.model, "bfloat16": copy.deepcopy(setting.model).to(torch.bfloat16)}
    rows = []
    with torch.no_grad(), contextlib.ExitStack() as held:
        for model in models.values():
            held.enter_context(model.packed_experts())
        for users, beams in CELLS:
            setting.ask(users)

            def recommend(name: str, beams: int = beams) -> Callable[[], Any]:
                options = {"num_beams": beams, "num_return_sequences": beams, "session_length": 1, "distinct": False}
                return lambda: models[name].recommend(**setting.inputs, **options)

            runs = {"default": by_default(recommend("float32"))} | {name: recommend(name) for name in models}
            interleaved(runs, 1)
            repetitions = 1 if quick else 15 if users == 1 else 5 if users == 8 else 3
            cpu, _ = interleaved(runs, repetitions)
            cell = f"{users}x{beams}"
            for name in models:
                rows.append({**ratio_row(f"speedup_{cell}/{name}", cpu, "default", name), "against": "default"})
            for name, seconds in cpu.items():
                rows.append(result_row(f"{cell}/{name}_ms", 1e3 * statistics.median(seconds), "ms"))
            if users == 1:
                rows += [row for name, model in models.items() for row in floor(setting, model, name, cell, cpu[name])]
            say(f"{cell}: {', '.join(f'{name} {statistics.median(seconds):.3f} s' for name, seconds in cpu.items())}")
    return rows


def floor(setting: Setting, model: Any, name: str, cell: str, seconds: list[float]) -> list[dict[str, Any]]:
    """What a request of 1 user must take at least, and how much more it takes."""
    import torch

    from onerec_hf.evaluation.results import result_row

    chosen: list[int] = []
    gates = [layer.mlp.gate for layer in model.get_decoder().layers]
    hooks = [gate.register_forward_hook(lambda _, __, out: chosen.append(len(out[2].unique()))) for gate in gates]
    model.recommend(**setting.inputs, num_beams=10, num_return_sequences=10, session_length=1, distinct=False)
    for hook in hooks:
        hook.remove()
    config, dtype = model.config, model.dtype
    experts = model.get_decoder().layers[0].mlp.experts
    an_expert = (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()) * dtype.itemsize
    width, layers, steps = config.hidden_size, config.decoder_layers, config.num_codebooks
    # Of cross-attention's four projections a step reads two: keys and values of the history are computed once.
    dense = steps * (layers * 6 * width**2 + config.vocab_size * width) * dtype.itemsize
    read = sum(chosen) * an_expert + dense
    block = torch.zeros(1 << 26)
    bandwidth = block.numel() * 4 / fastest(block.sum)
    of_encoder = sum(weight.numel() for weight in model.get_encoder().layers.parameters()) + 2 * layers * width**2
    states, weight = torch.randn(1024, 256).to(dtype), torch.randn(1024, 256).to(dtype)
    product = torch.ops.mkldnn._linear_pointwise
    rate = 2 * 1024 * 256 * 1024 / fastest(lambda: product(states, weight, None, "none", [], ""))
    tokens = HISTORY * config.tokens_per_item
    lowest = read / bandwidth + 2 * tokens * of_encoder / rate
    return [
        result_row(f"{cell}/{name}_bytes", read / 2**20, "MiB"),
        result_row(f"{cell}/{name}_floor_ms", 1e3 * lowest, "ms"),
        result_row(f"{cell}/{name}_over_floor", statistics.median(seconds) / lowest, "ratio", against="floor"),
        result_row(f"bandwidth/{name}", bandwidth / 1e9, "GB/s"),
        result_row(f"product/{name}", rate / 1e9, "GFLOP/s"),
    ]


def expert_products() -> list[dict[str, Any]]:
    """The first product of an expert in the precisions that torch and torchao have."""
    import torch
    from torch import nn

    from onerec_hf.evaluation.results import result_row
    from onerec_hf.modeling.cpu_experts import PackedWeights, product

    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError:
        quantize_ = None
    rows = []
    for count in (1, 10):
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            states, name = torch.randn(count, 256).to(dtype), str(dtype).removeprefix("torch.")
            layers: Any = nn.ModuleList([nn.Linear(256, 2048, bias=False) for _ in range(24)]).to(dtype)
            weights = {
                name: [layer.weight for layer in layers],
                f"{name}_packed": [PackedWeights((layer.weight,)).weights[0] for layer in layers],
            }
            with torch.no_grad():
                for label, each in weights.items():
                    found[label] = fastest(lambda each=each, states=states: [product(states, w) for w in each]) / 24
                if quantize_ is not None:
                    quantize_(layers, Int8WeightOnlyConfig())
                    found[f"{name}_int8"] = (
                        fastest(lambda layers=layers, states=states: [of(states) for of in layers]) / 24
                    )
        rows += [result_row(f"expert_{count}/{name}", 1e6 * seconds, "us") for name, seconds in found.items()]
    return rows


def training(quick: bool, data_dir: str) -> list[dict[str, Any]]:
    import torch

    from benchmarks.speed.training import count_targets, load, make_batches, make_model
    from onerec_hf.evaluation.results import result_row

    batches = make_batches(*load(data_dir), 1, 4 if quick else 18, 64)["packed"]

    def step(low: bool) -> tuple[Callable[[], None], list[float]]:
        model, losses = make_model("packed", 256, 1 if quick else 4), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                losses_of = [model(**batch).loss for batch in batches]
            torch.stack(losses_of).mean().backward()
            losses.append(float(torch.stack(losses_of).detach().mean()))
            optimizer.step()
            optimizer.zero_grad()

        return run, losses

    (default, _), (wide, of_wide), (low, of_low) = step(False), step(False), step(True)
    runs = {"default": by_default(default), "float32": wide, "bfloat16": low}
    interleaved(runs, 1)
    cpu, _ = interleaved(runs, 1 if quick else 6)
    targets = count_targets(batches)
    rows = [
        {**ratio_row(f"train_speedup/{name}", cpu, "default", name), "against": "default"}
        for name in ("float32", "bfloat16")
    ]
    for name, seconds in cpu.items():
        rows.append(result_row(f"train/{name}", targets / statistics.median(seconds), "targets/s"))
    gap = max(abs(a - b) / a for a, b in zip(of_wide, of_low, strict=True))
    return [*rows, result_row("train/loss_gap", gap, "ratio", against="train/float32")]


def quality(folder: str, data_dir: str, quick: bool) -> list[dict[str, Any]]:
    import torch

    from onerec_hf.evaluation.results import result_row
    from onerec_hf.workflows.artefact import load_model, load_processor
    from onerec_hf.workflows.evaluation import evaluate, held_out
    from onerec_hf.workflows.loading import load_dataset

    name = json.loads(Path(folder, "data_options.json").read_text())["dataset"]
    place = Path(data_dir, name.replace("-", "_"))
    given: dict[str, Any] = {"data_dir": str(place)} if name.startswith("amazon") else {}
    data = load_dataset(model=folder, dataset=name, **given)
    processor = load_processor("--model", folder)
    wide: Any = load_model("--model", folder, dtype="float32").eval()
    models = {"float32": wide, "bfloat16": copy.deepcopy(wide).to(torch.bfloat16)}
    examples = held_out(data, "test")
    examples = examples.select(range(min(len(examples), 64 if quick else 3000)))
    rows = []
    label = f"quality/{Path(folder).name}"
    for name in models:
        found = evaluate(data, model=folder, dtype=name, baselines=False, top_k=[10]).metrics["onerec/recall@10"]
        rows.append(result_row(f"{label}/recall@10/{name}", found, "share"))
    for way, weights in (("default", {}), ("decoder", {"decoder_weight": 1.0, "item_score_weight": 0.0})):
        lists: dict[str, list[list]] = {name: [] for name in models}
        for start in range(0, len(examples), 64):
            inputs = processor(examples[start : start + 64]["history"])
            options = {"num_beams": 50, "num_return_sequences": 10, "session_length": 1, "exclude_seen": True}
            for name, model in models.items():
                items = [item for (item,) in processor.batch_decode(model.recommend(**inputs, **options, **weights))]
                lists[name] += [items[i : i + 10] for i in range(0, len(items), 10)]
        pairs = list(zip(*lists.values(), strict=True))
        equal = sum(a == b for a, b in pairs), sum(set(a) == set(b) for a, b in pairs)
        rows.append(result_row(f"{label}/{way}/equal_lists", equal[0] / len(pairs), "share", against="float32"))
        rows.append(result_row(f"{label}/{way}/equal_sets", equal[1] / len(pairs), "share", against="float32"))
    say(f"{folder}: {len(examples):,} users")
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", default=DATA, help="folder of the data sets")
    options.add_argument("--models", nargs="*", default=[], help="folders of generators that `train` wrote")
    arguments = options.parse_args()
    one_thread()
    before = cpu_seconds()
    from onerec_hf.evaluation.results import result_row
    from onerec_hf.modeling.cpu_experts import bfloat16_is_faster, onednn_is_faster

    rows = []
    for folder in arguments.models:
        rows += quality(folder, arguments.data_dir, arguments.quick)
    if not arguments.models:
        rows += recommendations(arguments.quick)
        rows += expert_products()
        rows += training(arguments.quick, f"{arguments.data_dir}/amazon_beauty")
        chosen = {"onednn_is_faster": onednn_is_faster(), "bfloat16_is_faster": bfloat16_is_faster(256)}
        rows += [result_row(name, int(value), "flag") for name, value in chosen.items()]
    say(f"{cpu_seconds() - before:.0f} CPU s")
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
