"""
Training speed on Beauty's real training sequences (leave-one-out, latest 20 items): targets per CPU second of full steps (forward,
backward, AdamW) that all learn the same targets, interleaved, one torch thread, float32.

    python benchmarks/speed/training.py --data_dir ../shared/data/amazon_beauty --json benchmarks/results/training.json

A target is one (history, session) pair; sessions are one item (TIGER's pointwise training) unless a row's name ends in `session3`. Sizes are
TIGER's: 4 + 4 layers, 6 heads of 64, d_ff 1024, at d = 128 and 256; OneRec's decoder has 24 experts of width 512, top-2, the same active
size. Semantic IDs are drawn at random: 3 levels of 256. Variants, each one optimizer step on the same targets:

    t5                transformers' T5ForConditionalGeneration, dense, on windows: shuffled batches of 128, padded to their longest history
    t5 grouped        the same with batches of like length, as train_sampling_strategy="group_by_length" makes them
    windows           OneRec on the batches of t5
    windows grouped   OneRec on the batches of t5 grouped
    packed windows    OneRec on windows packed into rows of 32 history items (PackedDataset)
    packed            OneRec with a causal encoder on packed prefixes: each history once for all its targets

`packed_over_X` is packed's targets per second over those of X, at d = 256 unless the name says otherwise. `peak/...` is VmHWM of a separate
process that takes one step; imports are about half a GiB of it.

`moe_over_dense_4096_tokens`: CPU time of OneRecSparseMoeBlock (24 experts of width 512, top-2, routing included; forward and backward) over
that of a dense SwiGLU of width 1024 on the same 4096 tokens of width 256.

`mfu` = 6 * M / (t * G) for packed at d = 256: t its CPU seconds a step, G the multiply-adds a second times two of the fastest of several
2048 x 2048 float32 products in the same run, and M the model's multiply-adds in a forward pass, padding not counted:

    encoder  real tokens * layers * (4 d a + 3 d f) + layers * 2 a * (visible token pairs)           a = heads * 64, f = 1024
             real tokens * decoder layers * 2 d a                                                    keys and values of cross-attention
    decoder  real tokens * layers * (4 d a + 2 d a + 3 d f + 24 d) + layers * 2 a * (visible pairs, self and cross)
             real tokens * d * vocabulary

(6 = 2 operations a multiply-add, times 3 for forward and backward.)
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/training.py`

from benchmarks.harness import DATA, cpu_seconds, finish, interleaved, one_thread, parser, peak_gib, ratio_row, say

MAX_HISTORY, PACKING_LENGTH = 20, 32
HEADS, HEAD_DIM, INNER, CODES = 6, 64, 1024, [256, 256, 256]
WIDTHS = (128, 256)
VARIANTS = ("t5", "t5 grouped", "windows", "windows grouped", "packed windows", "packed")
WITH_SESSION3 = ("t5", "windows", "packed")
WITH_PEAK = ("t5", "windows", "packed windows", "packed")


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/amazon_beauty", help="folder of Beauty's files")
    return options.parse_args()


def load(data_dir: str):
    """Beauty's training sequences and a processor whose semantic IDs are random."""
    from onerec_hf import ItemCatalogue, OneRecProcessor
    from onerec_hf.workflows import load_in_memory
    from onerec_hf.workflows.settings import DataSettings

    data = load_in_memory(DataSettings(dataset="amazon-beauty", data_dir=data_dir, max_history=MAX_HISTORY))
    flat = np.random.default_rng(0).permutation(np.prod(CODES))[: len(data.item_ids)]
    catalogue = ItemCatalogue(data.item_ids, np.stack(np.unravel_index(flat, CODES), 1), CODES)
    return data.split.train_sequences, OneRecProcessor.from_catalogue(catalogue, MAX_HISTORY)


def make_batches(sequences, processor, session_length: int, rows: int, window_batch: int) -> dict[str, list[dict]]:
    """The same targets for every variant: those of so many random packed rows of prefixes, in batches of tensors."""
    from onerec_hf.data import (
        OneRecDataCollator,
        PackedDataCollator,
        PackedDataset,
        prefix_examples,
        window_examples,
    )

    def packed_batch(packed, chosen, causal):
        collator = PackedDataCollator(processor, causal, packed.items, packed.slots, packed.session_items)
        return [collator(packed.__getitems__(chosen))]

    windows = window_examples(sequences, session_length, MAX_HISTORY)
    prefixes = prefix_examples(sequences, session_length, MAX_HISTORY)
    rng = np.random.default_rng(0)
    packed = PackedDataset(prefixes, PACKING_LENGTH, MAX_HISTORY)
    chosen = rng.permutation(len(packed))[:rows]
    # Windows stand in the order of the prefixes' sessions.
    counts = np.array([len(lengths) for lengths in prefixes["history_lengths"]])
    owners = np.repeat(np.arange(len(counts)), counts)
    examples = np.concatenate([packed.rows[i] for i in chosen])
    targets = rng.permutation(np.flatnonzero(np.isin(owners, examples)))
    subset = windows.select(targets)
    packed_windows = PackedDataset(subset, PACKING_LENGTH, MAX_HISTORY)
    lengths = np.array([len(history) for history in subset["history"]])
    collator = OneRecDataCollator(processor)

    def window_batches(order):
        parts = np.array_split(order, -(-len(order) // window_batch))
        return [collator([subset[int(i)] for i in part]) for part in parts]

    shuffled, grouped = window_batches(np.arange(len(subset))), window_batches(np.argsort(lengths, kind="stable"))
    return {
        "t5": shuffled,
        "t5 grouped": grouped,
        "windows": shuffled,
        "windows grouped": grouped,
        "packed windows": packed_batch(packed_windows, range(len(packed_windows)), False),
        "packed": packed_batch(packed, chosen, True),
    }


def count_targets(batches: list[dict[str, Any]]) -> int:
    return sum(int((batch["labels"][:, 0] != -100).sum()) for batch in batches)


def make_model(variant: str, width: int, layers: int):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from onerec_hf import OneRecConfig, OneRecForConditionalGeneration

    torch.manual_seed(0)
    if variant.startswith("t5"):
        return T5ForConditionalGeneration(
            T5Config(
                decoder_start_token_id=1,  # pyright: ignore[reportCallIssue]
                vocab_size=OneRecConfig(codebook_sizes=CODES).vocab_size or 0,
                d_model=width,
                d_kv=HEAD_DIM,
                d_ff=INNER,
                num_layers=layers,
                num_heads=HEADS,
            )
        ).train()
    return OneRecForConditionalGeneration(
        OneRecConfig(
            codebook_sizes=CODES,
            hidden_size=width,
            intermediate_size=INNER,
            moe_intermediate_size=INNER // 2,
            num_attention_heads=HEADS,
            head_dim=HEAD_DIM,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_is_causal=variant == "packed",
        )
    ).train()


def make_step(variant: str, width: int, layers: int, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """One optimizer step over all batches, as Trainer accumulates them."""
    import torch

    model = make_model(variant, width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_of_a_step(pipe, variant: str, width: int, layers: int, arrays: list[dict[str, np.ndarray]]) -> None:
    """Sends the peak memory of this process after one step; runs in a separate process."""
    import torch

    one_thread()
    make_step(variant, width, layers, [{name: torch.from_numpy(a) for name, a in batch.items()} for batch in arrays])()
    pipe.send(peak_gib())


def measure_peaks(batches: dict[str, list[dict[str, Any]]], width: int, layers: int) -> dict[str, float]:
    # A server that has imported and done nothing else starts each process: the import is paid once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.models.t5.modeling_t5", "onerec_hf.modeling.modeling_onerec"]
    )
    peaks = {}
    for variant in WITH_PEAK:
        arrays = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches[variant]]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak_of_a_step, args=(sender, variant, width, layers, arrays))
        process.start()
        sender.close()
        peaks[variant] = receiver.recv()
        process.join()
    return peaks


def multiply_adds(batch: dict[str, Any], width: int, layers: int) -> float:
    """M of the formula on top, for a packed batch."""
    from onerec_hf import OneRecConfig

    attention, vocabulary = HEADS * HEAD_DIM, OneRecConfig(codebook_sizes=CODES).vocab_size or 0
    tokens = int((batch["segment_ids"] > 0).sum())
    written = batch["decoder_attention_mask"].sum(1)
    steps = int(written.sum())
    lengths = [row[row > 0].bincount()[1:] for row in batch["segment_ids"]]
    visible = sum(int((n * (n + 1) // 2).sum()) for n in lengths)
    read = (batch["history_ranges"][..., 1] - batch["history_ranges"][..., 0]).flatten()
    looked_at = int((written * (written + 1) // 2).sum() + (written * read).sum())
    encoder = tokens * (4 * width * attention + 3 * width * INNER) + 2 * attention * visible
    cross = tokens * 2 * width * attention
    decoder = steps * (6 * width * attention + 3 * width * INNER + 24 * width) + 2 * attention * looked_at
    return layers * (encoder + cross + decoder) + steps * width * vocabulary


def gemm_peak(repetitions: int = 6) -> float:
    """Floating point operations a CPU second of the fastest of several 2048^3 products."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(repetitions):
        before = cpu_seconds()
        torch.mm(a, b)
        seconds.append(cpu_seconds() - before)
    return 2 * 2048**3 / min(seconds)


def moe_against_dense(repetitions: int):
    """CPU times of the sparse block and of a dense layer with the same active size on 4096 tokens."""
    import torch

    from onerec_hf.modeling.layers_onerec import OneRecMLP

    model = make_model("windows", 256, 1)
    layers = {"moe": model.model.decoder.layers[0].mlp, "dense": OneRecMLP(model.config)}
    states = torch.randn(1, 4096, 256)

    def run(layer) -> Callable[[], None]:
        def forward_and_backward() -> None:
            out = layer(states.detach().requires_grad_())
            (out[0] if isinstance(out, tuple) else out).sum().backward()
            layer.zero_grad()

        return forward_and_backward

    runs = {name: run(layer) for name, layer in layers.items()}
    interleaved(runs, 1)
    return interleaved(runs, repetitions)[0]


def speed_row(name: str, cpu: dict[str, list[float]], mine: str, against: str) -> dict[str, Any]:
    """Targets per second, `mine` over `against`: the inverse of the CPU times, since the targets are the same."""
    return {**ratio_row(name, cpu, against, mine), "against": against}


def main() -> None:
    options = arguments()
    one_thread()
    from onerec_hf.evaluation.results import result_row

    # Rows of about 28 targets: at 18 a step has 500 targets, 1500 decoder tokens, 125 an expert.
    rows_a_step, window_batch, layers, repetitions = (4, 32, 1, 2) if options.quick else (18, 128, 4, 3)
    data = load(options.data_dir)
    batches = {n: make_batches(*data, n, rows_a_step, window_batch) for n in (1, 3)}
    targets = {n: count_targets(batches[n]["packed"]) for n in batches}
    for n, variants in batches.items():
        assert all(count_targets(parts) == targets[n] for parts in variants.values())
    say(f"{targets[1]} targets a step, {layers} + {layers} layers")
    rows, seconds = [], {}
    for width in WIDTHS:
        steps = {name: make_step(name, width, layers, batches[1][name]) for name in VARIANTS}
        if width == 256:
            steps |= {f"{n} session3": make_step(n, width, layers, batches[3][n]) for n in WITH_SESSION3}
        # The first step allocates the optimizer's state, which is small beside the long steps.
        interleaved({name: step for name, step in steps.items() if name.startswith("packed") or not options.quick}, 1)
        cpu = seconds[width] = interleaved(steps, repetitions)[0]
        for name in VARIANTS[:-1]:
            rows.append(speed_row(f"packed_over_{name.replace(' ', '_')}_d{width}", cpu, "packed", name))
        rows.append(speed_row(f"packed_windows_over_windows_d{width}", cpu, "packed windows", "windows"))
        for name, times in cpu.items():
            rates = [targets[3 if name.endswith("session3") else 1] / time for time in times]
            rate = result_row(
                f"d{width}/{name}", statistics.median(rates), "targets/s", spread=[min(rates), max(rates)]
            )
            rows.append(rate)
        say(f"width {width}: {', '.join(f'{name} {min(times):.2f} s' for name, times in cpu.items())}")
    cpu = seconds[256]
    headline = [speed_row(f"packed_over_{name}", cpu, "packed", name) for name in ("windows", "t5")]
    for name in ("windows", "t5"):
        row = speed_row(f"packed_over_{name}_session3", cpu, "packed session3", f"{name} session3")
        headline.append(row)
    headline.append(
        ratio_row("moe_over_dense_4096_tokens", moe_against_dense(5 if options.quick else 15), "moe", "dense")
    )
    peak, operations = gemm_peak(), 6 * multiply_adds(batches[1]["packed"][0], 256, layers)
    shares = [operations / (time * peak) for time in cpu["packed"]]
    headline.append(result_row("mfu", statistics.median(shares), "ratio", spread=[min(shares), max(shares)]))
    headline.append(result_row("gemm_peak", peak / 1e9, "GFLOP/s"))
    for name, gib in measure_peaks(batches[1], 256, layers).items():
        rows.append(result_row(f"peak/{name}", gib, "GiB"))
    finish(headline + rows, options.json, targets_a_step=targets[1], layers=layers, packing_length=PACKING_LENGTH)


if __name__ == "__main__":
    main()
