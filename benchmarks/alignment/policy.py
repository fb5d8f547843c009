"""
Rollouts of policy optimisation: sessions per second beside what TRL's GRPO calls for a text model, and their share of a training step.

    python benchmarks/alignment/policy.py --json benchmarks/results/policy.json

The peer is T5 with a catalogue: `generate` with `do_sample` and `prefix_allowed_tokens_fn` over a dict of prefixes, as TRL's trainer calls it (it takes
decoder-only models alone, so its training step cannot be measured): `trl` with every prompt G times, as TRL's sampler repeats them, `shared` with
`num_return_sequences=G`, so that the encoder runs once per history. Both models have random weights and the same width, layers,
heads, feed-forward width, codes and items; `dense` is without experts, as T5 is. T5 reads and writes three tokens per
item, OneRec four. T5 draws with replacement and may repeat an item or one of the history, OneRec draws different sessions of different new items. Times
are CPU seconds of one thread, in turns. A step has one optimizer step and the default settings of `OneRecGRPOConfig`, whose reward costs nothing here.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/policy.py`

from benchmarks.harness import cpu_seconds, finish, interleaved, one_thread, parser, ratio_row, say
from benchmarks.speed.constraint import random_codes

GENERATIONS, CODES, LEVELS = 32, 256, 3
SIZES: dict[str, dict[str, Any]] = {
    "d256": {},  # the defaults: two of 24 experts
    "d256_dense": {"num_experts": 1},
    "d64": {"hidden_size": 64, "intermediate_size": 128, "num_experts": 4, "encoder_layers": 2, "decoder_layers": 2},
}


class Setting:
    """Both models with their catalogue, and the histories that both read."""

    def __init__(self, size: str, items: int, history: int, users: int):
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor

        torch.manual_seed(0)
        config = OneRecConfig(codebook_sizes=[CODES] * LEVELS, initializer_range=0.1, **SIZES[size])
        self.model = OneRecForConditionalGeneration(config).eval()
        codes = random_codes(items, CODES)
        catalogue = ItemCatalogue(np.arange(items), codes, [CODES] * LEVELS)
        self.model.set_catalogue(catalogue)
        self.processor = OneRecProcessor.from_catalogue(catalogue, max_history=history)
        self.histories = np.random.default_rng(1).integers(0, items, (users, history)).tolist()
        heads = config.num_attention_heads
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=config.vocab_size,
                d_model=config.hidden_size,
                d_kv=config.hidden_size // heads,
                d_ff=config.intermediate_size,
                num_layers=config.encoder_layers,
                num_decoder_layers=config.decoder_layers,
                num_heads=heads,
                feed_forward_proj="gated-silu",
                decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
            )
        ).eval()
        tokens = codes + np.asarray(config.level_offsets)
        found: dict[tuple, set[int]] = defaultdict(set)
        for item in tokens.tolist():
            for level in range(LEVELS):
                found[tuple(item[:level])].add(item[level])
        self.children = {prefix: sorted(nexts) for prefix, nexts in found.items()}
        self.prompts = torch.from_numpy(tokens[np.array(self.histories)].reshape(users, -1))

    def allowed(self, _, tokens) -> list[int]:
        level = (len(tokens) - 1) % LEVELS
        return self.children[tuple(tokens[len(tokens) - level :].tolist())]

    def onerec(self, length: int) -> Any:
        import torch

        from onerec_hf.trainers.rollouts import roll_out

        generators = [torch.Generator().manual_seed(user) for user in range(len(self.histories))]
        return roll_out(self.model, self.processor, self.histories, GENERATIONS, generators, session_length=length)

    def t5_rollouts(self, length: int, copies: int) -> Any:
        """With `copies` of each prompt in the batch."""
        import torch

        prompts = self.prompts.repeat_interleave(copies, 0)
        with torch.no_grad():
            return self.t5.generate(  # pyright: ignore[reportAttributeAccessIssue]
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                num_return_sequences=GENERATIONS // copies,
                max_new_tokens=LEVELS * length,
                eos_token_id=None,
                top_k=0,
                prefix_allowed_tokens_fn=self.allowed,
            )


def speeds(size: str, setting: Setting, length: int, repetitions: int) -> list[dict[str, Any]]:
    """Sessions per CPU second of each, and the ratios."""
    from onerec_hf.evaluation.results import result_row

    sessions, rows = GENERATIONS * len(setting.histories), []
    with setting.model.packed_experts():
        drawn = setting.onerec(length)  # also warms up
        runs = {
            "onerec": lambda: setting.onerec(length),
            "trl": lambda: setting.t5_rollouts(length, GENERATIONS),
            "shared": lambda: setting.t5_rollouts(length, 1),
        }
        cpu, _ = interleaved(runs, repetitions)
    assert drawn.shape == (sessions, length * (LEVELS + 1))
    for name, seconds in cpu.items():
        rates = [sessions / each for each in seconds]
        spread = [min(rates), max(rates)]
        rows.append(result_row(f"{size}/x{length}/{name}", statistics.median(rates), "sessions/CPU s", spread=spread))
    for peer in ("trl", "shared"):
        rows.append({**ratio_row(f"{size}/x{length}/speedup_over_{peer}", cpu, peer, "onerec"), "against": peer})
        say(f"{size}, {length} items: {rows[-1]['value']:.1f} times the sessions per second of {peer}")
    return rows


def share_of_rollouts(size: str, setting: Setting, length: int, steps: int, ntp_weight: float) -> dict[str, Any]:
    """The row of CPU time in rollouts over that of whole steps, of the same trainer; the first step warms up."""
    import copy

    from datasets import Dataset
    from transformers import TrainerCallback

    from onerec_hf.evaluation.results import result_row
    from onerec_hf.trainers import OneRecGRPOConfig, OneRecGRPOTrainer
    from onerec_hf.workflows.artefact import catalogue_of

    random, items = np.random.default_rng(2), catalogue_of(setting.processor).item_ids
    rows = [
        {"history": history, "session": random.choice(items, length).tolist()} for history in setting.histories
    ] * 16
    found: dict[str, list[float]] = {"step": [], "rollouts": []}

    class Timed(OneRecGRPOTrainer):
        def _draw(self, *arguments):
            started = cpu_seconds()
            drawn = super()._draw(*arguments)
            found["rollouts"].append(cpu_seconds() - started)
            return drawn

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.started = cpu_seconds()

        def on_step_end(self, args, state, control, **kwargs):
            found["step"].append(cpu_seconds() - self.started)

    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecGRPOConfig(
            scratch,
            num_generations=GENERATIONS,
            per_device_train_batch_size=2 * GENERATIONS,
            rollout_length=length,
            ntp_weight=ntp_weight,
            max_steps=1 + steps,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Timed(
            copy.deepcopy(setting.model),
            lambda histories, sessions: np.arange(len(sessions), dtype=float).tolist(),
            args,
            Dataset.from_list(rows),
            processing_class=setting.processor,
            callbacks=[Steps()],
        ).train()
    shares = [part / whole for part, whole in zip(found["rollouts"][1:], found["step"][1:], strict=True)]
    name = f"{size}/x{length}/rollouts_share" + ("" if ntp_weight else "_without_ntp")
    say(f"{name}: {statistics.median(shares):.2f} of {statistics.median(found['step'][1:]):.2f} CPU s")
    return result_row(name, statistics.median(shares), "share of a step", spread=[min(shares), max(shares)])


def main() -> None:
    options = parser(__doc__)
    arguments = options.parse_args()
    quick = arguments.quick
    one_thread()
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that TRL reads
    items, history, users = (2000, 10, 1) if quick else (12_000, 50, 4)
    repetitions, rows = (1 if quick else 3), []
    for size in SIZES:
        setting = Setting(size, items, history, users)
        for length in (1, 5):
            rows += speeds(size, setting, length, repetitions)
        for weight in (1.0, 0.0):
            rows.append(share_of_rollouts(size, setting, 5, repetitions, weight))
    settings = {"generations": GENERATIONS, "items": items, "history_items": history, "users": users}
    finish(rows, arguments.json, settings=settings, weights="random, seed 0")


if __name__ == "__main__":
    main()
