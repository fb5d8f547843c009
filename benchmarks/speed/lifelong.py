"""
What a lifelong history costs: the encoder with 100,000 items, compressed to 2,000 and to the states of the pathway, over the encoder with the latest 300
items alone. CPU time of one thread, one user, width 256, four layers.

    python benchmarks/speed/lifelong.py --json benchmarks/results/lifelong.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import cpu_seconds, finish, interleaved, one_thread, parser, ratio_row

LATEST = 300


def encoders(quick: bool, pools: bool) -> dict[str, Any]:
    """Runs of the encoder without and with the pathway, on random items."""
    import torch

    from onerec_hf import OneRecConfig, OneRecForConditionalGeneration

    # Pooled, a state is a whole item's: as many items' places as 128 states of tokens.
    items, queries = (200, 16) if quick else (2000, 32 if pools else 128)
    latest = LATEST // 10 if quick else LATEST
    torch.manual_seed(0)
    sizes = {"hidden_size": 64 if quick else 256, "encoder_layers": 4, "decoder_layers": 1, "num_experts": 1}

    def history(count: int) -> torch.Tensor:
        codes = [torch.randint(4 + 256 * level, 260 + 256 * level, (count,)) for level in range(3)]
        return torch.stack([torch.full((count,), 3), *codes], dim=1)

    runs: dict[str, Any] = {}
    tokens = history(latest).view(1, -1)
    for name in ("latest", "lifelong"):
        options: dict[str, Any] = {"encoder_pools_items": pools, **sizes}
        inputs = {"input_ids": tokens}
        if name == "lifelong":
            options["lifelong"] = {"items": items, "queries": queries}
            compressed = history(items)[None]
            compressed[..., 0] = 50
            places = torch.full((1, queries * (4 if pools else 1)), 2)
            inputs = {"input_ids": torch.cat([places, tokens], dim=1), "lifelong_ids": compressed}
        encoder = OneRecForConditionalGeneration(OneRecConfig(**options)).eval().get_encoder()
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

        def run(encoder=encoder, inputs=inputs):
            with torch.no_grad():
                encoder(**inputs)

        run()
        runs[name] = run
    return runs


def compression(quick: bool) -> dict[str, Any]:
    """Seconds to compress one user's history, which a service does once and keeps."""
    import numpy as np

    from onerec_hf.evaluation.results import result_row
    from onerec_hf.modeling.lifelong_history import compress_history

    vectors = np.random.default_rng(0).normal(size=(5_000 if quick else 100_000, 64)).astype(np.float32)
    seconds = []
    for _ in range(2 if quick else 5):
        before = cpu_seconds()
        compress_history(vectors, 200 if quick else 2000)
        seconds.append(cpu_seconds() - before)
    return result_row("compress_100k", sorted(seconds)[len(seconds) // 2], "s", spread=[min(seconds), max(seconds)])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repetitions", type=int, default=20)
    options = arguments.parse_args()
    one_thread()
    rows = []
    for name, pools in (("lifelong_over_latest_300", False), ("lifelong_over_latest_300_pooled", True)):
        cpu, _ = interleaved(encoders(options.quick, pools), 3 if options.quick else options.repetitions)
        rows.append(ratio_row(name, cpu, "lifelong", "latest"))
    finish([*rows, compression(options.quick)], options.json)


if __name__ == "__main__":
    main()
