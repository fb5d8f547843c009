"""
What the item head adds to a request: `recommend()` with item scores, and with evidence and content, over the same call with the decoder alone.

    python benchmarks/speed/item_head.py --json benchmarks/results/item_head.json

Random weights, d = 256, 4 + 4 layers, 24 experts, histories of 50, content vectors of 384, neighbour lists of 50; CPU seconds of one thread,
interleaved, inside `packed_experts()`. Rows, per catalogue (12,000 items of 3 x 256 codes; a million of 3 x 8,192):

    ITEMS/USERSxBEAMSxSESSION/WAY   ratio to the decoder alone: "head" (item scores), "evidence" (with evidence and content), "head_alone" (these scores
                                    rank single items, no decoder runs)
    ITEMS/.../milliseconds          of a user, with evidence
    ITEMS/load, ITEMS/memory        seconds of `from_pretrained` from a warm disk, GiB of the head, its lists and content
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/item_head.py`

from benchmarks.harness import finish, interleaved, one_thread, parser, ratio_row, say
from benchmarks.speed.constraint import random_codes
from onerec_hf.evaluation.results import result_row

HISTORY, CONTENT, NEIGHBOURS = 50, 384, 50
CELLS = ((1, 10, 1), (8, 50, 1), (8, 50, 5))


def make(items: int, codes: int, quick: bool) -> dict[str, Any]:
    """Two models with the same decoder: with plain item scores, and with content and evidence; and the processor."""
    import torch

    from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
    from onerec_hf.modeling.item_evidence import DEFAULT_WEIGHTS, LISTS

    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_experts": 4}
    small |= {"encoder_layers": 1, "decoder_layers": 1}
    catalogue = ItemCatalogue(np.arange(items), random_codes(items, codes), [codes] * 3)
    found: dict[str, Any] = {"processor": OneRecProcessor.from_catalogue(catalogue, HISTORY)}
    for name, head in (
        ("head", {}),
        ("evidence", {"content_dim": CONTENT, "evidence": True, "neighbours": NEIGHBOURS}),
    ):
        torch.manual_seed(0)
        config = OneRecConfig(
            codebook_sizes=[codes] * 3, item_head={"num_items": items, **head}, **(small if quick else {})
        )
        model = OneRecForConditionalGeneration(config).eval()
        model.set_catalogue(catalogue)
        found[name] = model
    item_head = found["evidence"].get_encoder().item_head
    with torch.no_grad():
        item_head.content.normal_()
        item_head.content[0] = 0
    lists = torch.randint(1, items + 1, (items, NEIGHBOURS))
    counts = torch.randint(1, 20, (items, NEIGHBOURS)).float().sort(1, descending=True).values
    for name in LISTS:
        item_head.evidence.set_list(name, lists, counts)
    item_head.evidence.interactions.fill_(5.0)
    item_head.evidence.weights.copy_(torch.tensor(DEFAULT_WEIGHTS))
    return found


def measure(items: int, codes: int, quick: bool) -> list[dict[str, Any]]:
    name, made = f"{items // 1000}k", make(items, codes, quick)
    rows, models = [], (made["head"], made["evidence"])
    with models[0].packed_experts(), models[1].packed_experts():
        for users, beams, session in CELLS:
            histories = np.random.default_rng(1).integers(0, items, (users, HISTORY)).tolist()
            inputs = made["processor"](histories)
            asked = {"num_beams": beams, "num_return_sequences": beams, "session_length": session}

            def run(model, score_weight, decoder_weight=1.0, inputs=inputs, asked=asked):
                return lambda: model.recommend(
                    **inputs, **asked, item_score_weight=score_weight, decoder_weight=decoder_weight
                )

            runs = {"decoder": run(models[0], 0.0), "head": run(models[0], 1.0), "evidence": run(models[1], 1.0)}
            if session == 1:
                runs["head_alone"] = run(models[1], 1.0, 0.0)
            interleaved(runs, 1)  # warms up: the scores of prefixes and the catalogue's copies are made once
            cpu, _ = interleaved(runs, 2 if quick else 7)
            cell = f"{name}/{users}x{beams}x{session}"
            rows += [ratio_row(f"{cell}/{way}", cpu, way, "decoder") for way in runs if way != "decoder"]
            rows.append(result_row(f"{cell}/milliseconds", 1000 * statistics.median(cpu["evidence"]) / users, "ms"))
            say(f"{cell}: " + ", ".join(f"{way} {statistics.median(times):.3f} s" for way, times in cpu.items()))
    rows += loading(name, models[1])
    return rows


def loading(name: str, model: Any) -> list[dict[str, Any]]:
    """Seconds to load a saved model, and the size of its item head."""
    from onerec_hf import OneRecForConditionalGeneration

    head, times = model.get_encoder().item_head, []
    tensors = [*head.parameters(), *head.buffers()]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for _ in range(3):
            started = time.perf_counter()
            OneRecForConditionalGeneration.from_pretrained(folder)
            times.append(time.perf_counter() - started)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30
    return [
        result_row(f"{name}/load", statistics.median(times), "s", spread=[min(times), max(times)]),
        result_row(f"{name}/memory", size, "GiB"),
    ]


def main() -> None:
    options = parser(__doc__).parse_args()
    one_thread()
    quick, rows = options.quick, []
    for items, codes in ((2_000, 64), (4_000, 128)) if quick else ((12_000, 256), (1_000_000, 8192)):
        rows += measure(items, codes, quick)
    finish(rows, options.json, history_items=HISTORY, weights="random, seed 0")


if __name__ == "__main__":
    main()
