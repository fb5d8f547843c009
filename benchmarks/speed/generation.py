"""
Constrained session generation: `recommend()` compared with the beam search of transformers, with the same weights and the same results.

    python benchmarks/speed/generation.py --json benchmarks/results/generation.json

The peers of each cell (users x beams, items per session, codes per level):
  prefix_fn      `generate` with `prefix_allowed_tokens_fn` over a dict of prefixes: the usual way
  vectorised     `generate` with our SemanticIDLogitsProcessor in its place
  unconstrained  `generate` without any constraint
In all three, transformers handles the caches (one copy of the history's keys and values per beam, copied again at
every step), and so are the experts (grouped_mm). `recommend()` runs inside `model.packed_experts()` like a server or an evaluation; the
ablation has the numbers without it. Times are CPU seconds of one thread, in turns; a speed-up is the peer's time over that of `recommend()`.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/generation.py`

from benchmarks.harness import cpu_seconds, finish, interleaved, one_thread, parser, peak_gib, ratio_row, say
from benchmarks.speed.constraint import constraint_alone, random_codes

HISTORY = 50  # items: 200 tokens


class Setting:
    """A model, its catalogue, and the requests that every peer answers."""

    def __init__(self, model: Any, catalogue: Any, history: int = HISTORY):
        from transformers.generation.utils import GenerationMixin

        from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor

        inherited: Any = GenerationMixin

        class AsTransformersDoes(OneRecForConditionalGeneration):
            """The same model with the cache handling and the beam search that every model inherits."""

            _expand_inputs_for_generation = inherited._expand_inputs_for_generation
            _beam_search = inherited._beam_search

            def _reorder_cache(self, past_key_values, beam_idx):
                past_key_values.reorder_cache(beam_idx)
                return past_key_values

        class SelfReordered(AsTransformersDoes):
            _reorder_cache = OneRecForConditionalGeneration._reorder_cache

        class Shared(OneRecForConditionalGeneration):
            _beam_search = inherited._beam_search

        config = model.config
        self.model, self.codes, self.history = model, catalogue.codes, history
        self.processor = OneRecProcessor.from_catalogue(catalogue)
        self.inputs: Any = None
        self.peers = {}
        for cls in (AsTransformersDoes, SelfReordered, Shared):
            peer = cls(copy.deepcopy(config)).eval()
            peer.load_state_dict(model.state_dict())
            peer.to(model.device, model.dtype).set_catalogue(catalogue)
            peer.config._experts_implementation_internal = "grouped_mm"  # transformers' default
            self.peers[cls.__name__] = peer
        # Legal next tokens of each prefix of an item's tokens.
        found: dict[tuple, set[int]] = defaultdict(set)
        for item in (self.codes + np.asarray(config.level_offsets)).tolist():
            for level in range(3):
                found[tuple(item[:level])].add(item[level])
        self.children = {prefix: sorted(tokens) for prefix, tokens in found.items()}

    @classmethod
    def random(cls, items: int, codes: int, quick: bool) -> Setting:
        """A model with random weights and a catalogue of random semantic IDs."""
        import torch

        from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration

        small: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_experts": 4,
        }
        small |= {"encoder_layers": 1, "decoder_layers": 1}
        config = OneRecConfig(codebook_sizes=[codes] * 3, initializer_range=0.1, **(small if quick else {}))
        torch.manual_seed(0)
        model = OneRecForConditionalGeneration(config).eval()
        catalogue = ItemCatalogue(np.arange(items), random_codes(items, codes), [codes] * 3)
        model.set_catalogue(catalogue)
        return cls(model, catalogue)

    def ask(self, users: int) -> None:
        rng = np.random.default_rng(1)
        inputs = self.processor(rng.integers(0, len(self.codes), (users, self.history)).tolist())
        self.inputs = {name: value.to(self.model.device) for name, value in inputs.items()}

    def prefix_fn(self):
        children, bos = self.children, [self.model.config.bos_token_id]

        def allowed(_, tokens):
            level = (len(tokens) - 1) % 4
            return bos if level == 3 else children[tuple(tokens[len(tokens) - level :].tolist())]

        return allowed

    def recommend(self, beams: int, items: int):
        return self.model.recommend(
            **self.inputs, num_beams=beams, num_return_sequences=beams, session_length=items, distinct=False
        )

    def generate(self, peer: str, beams: int, items: int, **constraint):
        return self.peers[peer].generate(
            **self.inputs,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=4 * items - 1,
            length_penalty=0.0,
            eos_token_id=None,
            do_sample=False,
            **constraint,
        )

    def runs(self, beams: int, items: int) -> dict[str, Any]:
        constrained = {"constrained": True, "distinct": False}
        return {
            "recommend": lambda: self.recommend(beams, items),
            "prefix_fn": lambda: self.generate(
                "AsTransformersDoes", beams, items, constrained=False, prefix_allowed_tokens_fn=self.prefix_fn()
            ),
            "vectorised": lambda: self.generate("AsTransformersDoes", beams, items, **constrained),
            "unconstrained": lambda: self.generate("AsTransformersDoes", beams, items, constrained=False),
            "self_reordered": lambda: self.generate("SelfReordered", beams, items, **constrained),
            "shared": lambda: self.generate("Shared", beams, items, **constrained),
        }


def label(users: int, beams: int, items: int, codes: int) -> str:
    return f"{'session_' if items > 1 else ''}speedup_{users}x{beams}_over_{{}}{'' if codes == 256 else f'_k{codes}'}"


def measure_cells(setting: Setting, codes: int, cells, repetitions) -> list[dict[str, Any]]:
    """Speed-up rows of each cell, after a check that the constrained peers return the same sessions."""
    from onerec_hf.evaluation.results import result_row

    rows = []
    for (users, beams, items), peers in cells:
        setting.ask(users)
        runs = {name: run for name, run in setting.runs(beams, items).items() if name in ("recommend", *peers)}
        mine = runs["recommend"]()  # also warms up
        if "vectorised" in peers and users * beams <= 400:
            theirs = runs["vectorised"]()
            same = float((mine == theirs).all(1).float().mean())
            name = f"same_sessions_{users}x{beams}x{items}" + ("" if codes == 256 else f"_k{codes}")
            rows.append(result_row(name, same, "share", against="vectorised"))
        cpu, wall = interleaved(runs, repetitions if users * beams <= 400 else max(1, repetitions - 3))
        for peer in peers:
            row = ratio_row(label(users, beams, items, codes).format(peer), cpu, peer, "recommend")
            row["against"] = peer
            rows.append(row)
            seconds, elapsed = statistics.median(cpu["recommend"]), statistics.median(wall["recommend"])
            say(f"{row['name']} {row['value']:.2f} (recommend: {seconds:.3f} CPU s, {elapsed:.3f} s wall)")
    return rows


def ablation(setting: Setting, users: int, beams: int, items: int, repetitions: int) -> list[dict[str, Any]]:
    """Each trick's share: the time without it over the time of `recommend()`, and the steps that lead from `generate` to it."""
    import torch

    from onerec_hf.modeling import generation_onerec
    from onerec_hf.modeling.beam_search import BeamDecoder

    class BosAlone(BeamDecoder):
        def step(self, tokens):
            for column in tokens.split(1, dim=1):
                states = super().step(column)
            return states

    class FreshCopies(BeamDecoder):
        def reorder(self, origin):
            self.buffer = self.buffer.index_select(0, origin)

    def without(name, value, where: Any = generation_onerec):
        def run():
            with patch.object(where, name, value):
                setting.recommend(beams, items)

        return run

    decoder: Any = setting.model.get_decoder()

    def not_packed():
        layers: list[Any] = [layer.mlp.experts for layer in decoder.layers]
        kept = [experts.packed for experts in layers]
        for experts in layers:
            experts.packed = None
        setting.recommend(beams, items)
        for experts, packed in zip(layers, kept, strict=True):
            experts.packed = packed

    def grouped():
        setting.model.set_experts_implementation("grouped_mm")
        setting.recommend(beams, items)
        setting.model.set_experts_implementation("onerec")

    setting.ask(users)
    runs = setting.runs(beams, items)
    tried = {
        "recommend": runs["recommend"],
        "generate_prefix_fn": runs["prefix_fn"],
        "generate_vectorised": runs["vectorised"],
        "generate_self_cache_reordered": runs["self_reordered"],
        "generate_history_shared": runs["shared"],
        "bos_fed_alone": without("_beam_decoder", BosAlone, type(setting.model)),
        "cache_copied_to_fresh_memory": without("_beam_decoder", FreshCopies, type(setting.model)),
        "experts_not_packed": not_packed,
        "experts_by_grouped_mm": grouped,
        "all_users_at_once": without("_CPU_ROWS_AT_ONCE", 1 << 30),
    }
    with torch.no_grad():
        cpu, _ = interleaved(tried, repetitions)
    return [
        ratio_row(f"ablation_{users}x{beams}x{items}/{name}", cpu, name, "recommend")
        for name in tried
        if name != "recommend"
    ]


def flops_per_position(config, history: int) -> float:
    """Of one decoder token, embedding to logits: twice the multiplications of its matrix products (experts: the active ones)."""
    width, inner = config.hidden_size, config.moe_intermediate_size
    projections = 6 * width * width
    experts = 3 * width * inner * config.num_experts_per_tok + width * config.num_experts
    cross = 2 * width * history
    return 2 * (config.decoder_layers * (projections + experts + cross) + width * config.vocab_size)


def gemm_peak() -> float:
    """Best float32 rate of this machine's matrix product, one thread, in FLOP/s."""
    import torch

    best = 0.0
    for m, k, n in ((1024, 256, 2048), (2048, 1024, 1024), (2048, 2048, 2048)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        for _ in range(5):
            started = cpu_seconds()
            for _ in range(3):
                torch.mm(a, b)
            best = max(best, 3 * 2 * m * k * n / max(cpu_seconds() - started, 1e-9))
    return best


def decoder_over_floor(setting: Setting, repetitions: int) -> list[dict[str, Any]]:
    """Time of a search (decoder, logits, constraint, selection; the encoder's is subtracted) over FLOPs / measured GEMM peak."""
    import torch

    from onerec_hf.evaluation.results import result_row

    rows = []
    config = setting.model.config
    for users, beams, items in ((8, 128, 1), (8, 128, 5), (1, 10, 5)):
        setting.ask(users)
        levels = config.num_codebooks
        first_beams = min(beams, len(np.unique(setting.codes[:, 0])))
        # Fed: BOS for each user, then levels - 1 codes, then per further item its predecessor's last code with BOS and levels - 1 codes.
        # Beside them, the history's keys and values.
        positions = users * (1 + first_beams + beams * (levels - 2)) + users * beams * (items - 1) * (levels + 1)
        history = HISTORY * config.tokens_per_item
        floor_flops = positions * flops_per_position(config, history)
        floor_flops += users * history * config.decoder_layers * 4 * config.hidden_size**2
        ratios = []
        for _ in range(repetitions + 1):
            peak = gemm_peak()
            with torch.no_grad():
                cpu, _ = interleaved(
                    {
                        "all": lambda beams=beams, items=items: setting.recommend(beams, items),
                        "encoder": lambda: setting.model.get_encoder()(**setting.inputs),
                    },
                    1,
                )
            ratios.append((cpu["all"][0] - cpu["encoder"][0]) / (floor_flops / peak))
        name = f"decoder_over_floor_{users}x{beams}" + ("" if items == 1 else f"x{items}")
        rows.append(
            result_row(
                name,
                statistics.median(ratios[1:]),
                "ratio",
                against="FLOPs / GEMM peak",
                spread=[min(ratios[1:]), max(ratios[1:])],
            )
        )
        say(f"{name} {rows[-1]['value']:.2f} (peak {peak / 1e9:.0f} GFLOP/s)")
    return rows


def peak_of(which: str, quick: bool) -> float:
    """Peak memory (GiB) above that of the loaded model, of one request at 32 x 128 x 5; runs in a separate process."""
    one_thread()
    setting = Setting.random(12_000, 256, quick)
    setting.ask(1)
    setting.runs(2, 1)[which]()
    setting.ask(32)
    before = peak_gib()
    setting.runs(128, 5)[which]()
    return peak_gib() - before


def memory(quick: bool) -> list[dict[str, Any]]:
    from onerec_hf.evaluation.results import result_row

    peaks = {}
    for which in ("recommend", "prefix_fn"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[which] = pool.apply(peak_of, (which, quick))
        say(f"peak of {which}: {peaks[which]:.2f} GiB")
    rows = [result_row(f"peak_32x128x5/{which}", peak, "GiB") for which, peak in peaks.items()]
    rows.append(
        result_row(
            "peak_32x128x5_over_prefix_fn", peaks["recommend"] / peaks["prefix_fn"], "ratio", against="prefix_fn"
        )
    )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--all", action="store_true", help="every cell of the grid, not only the named ones; hours")
    arguments = options.parse_args()
    quick = arguments.quick
    one_thread()
    every = ("prefix_fn", "vectorised", "unconstrained")
    repetitions = 1 if quick else 5
    most = ("prefix_fn", "unconstrained") if quick else every
    named = {
        (1, 10, 1): ("prefix_fn", "vectorised", "unconstrained"),
        (1, 10, 5): ("prefix_fn", "unconstrained"),
        (8, 50, 1): every,
        (8, 50, 5): most,
        (32, 128, 1): most,
        (32, 128, 5): ("prefix_fn",),
    }
    large = {(1, 10, 1): every, (8, 50, 1): every, (8, 50, 5): ("prefix_fn",)}
    if arguments.all:
        grid = dict.fromkeys(itertools.product((1, 8, 32), (10, 50, 128), (1, 5)), every)
        named, large = grid | named, grid | large
    small = Setting.random(12_000, 256, quick)
    with small.model.packed_experts():
        rows = measure_cells(small, 256, named.items(), repetitions)
        rows += decoder_over_floor(small, 1 if quick else 5)
        if not quick:
            rows += ablation(small, 8, 50, 1, 3) + ablation(small, 8, 50, 5, 2)
    del small
    rows += constraint_alone(quick, repetitions)
    rows += memory(quick)
    if not quick:
        big = Setting.random(1_000_000, 8192, quick)
        with big.model.packed_experts():
            rows += measure_cells(big, 8192, large.items(), 3)
    finish(rows, arguments.json, history_items=HISTORY, weights="random, seed 0")


if __name__ == "__main__":
    main()
