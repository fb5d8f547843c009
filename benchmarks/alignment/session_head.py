"""
Sessions in one pass (`recommend(session_decoding="parallel")`, after NAR4Rec) beside beam search: their time, and their true reward in the simulator.

    python benchmarks/alignment/session_head.py --json benchmarks/results/session_head.json
    python benchmarks/alignment/session_head.py --quick

Speed: 8 histories of 50 items, sessions of five, random weights of the default size with an item head, 12,000 items, beams of 50. CPU seconds of one thread,
in turns; `parallel_16` returns 16 sessions for a user in place of one.

Simulator (`simulator.py`, its world, data and reward models): one OneRec with an item head per seed, and from it
  beam, beam_50          10 beams, as the simulator's table has them, and 50
  beam_picked            the best of 32 beams by the reward model
  parallel               a session head trained on the sessions of the data: likelihood alone
  parallel_reward        and on sessions that it draws, by the reward model: likelihood of the best, unlikelihood of the worst
  parallel_no_unlikely   the same without unlikelihood
  parallel_alpha_0       the head of `parallel_reward` without contrastive decoding
  parallel_picked        the best of 32 sessions of `parallel_reward` by the reward model, the evaluator

Parts are kept in PATH.runs.jsonl until all are complete, so that a killed benchmark resumes.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/session_head.py`

from benchmarks.alignment.preferences import quiet
from benchmarks.alignment.simulator import QUICK, Setting, Sizes, _generator, load_setting
from benchmarks.harness import DATA, cpu_seconds, finish, interleaved, parser, ratio_row, say
from benchmarks.speed.constraint import random_codes

PICKED = 32


def speed(quick: bool, repetitions: int) -> list[dict[str, Any]]:
    """Rows of times over that of parallel sessions."""
    import torch

    from onerec_hf import ItemCatalogue, ItemHeadConfig, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
    from onerec_hf.modeling.session_head import ParallelDecoder, SessionHead

    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_experts": 4, "decoder_layers": 2}
    head = ItemHeadConfig(num_items=12_000, loss_weight=1.0)
    config = OneRecConfig(codebook_sizes=[256] * 3, initializer_range=0.1, item_head=head, **(small if quick else {}))
    model = OneRecForConditionalGeneration(config).eval()
    catalogue = ItemCatalogue(np.arange(12_000), random_codes(12_000, 256), [256] * 3)
    model.set_catalogue(catalogue)
    model.parallel_decoder = ParallelDecoder(SessionHead(config.hidden_size, 5), alpha=0.1)
    processor = OneRecProcessor.from_catalogue(catalogue)
    inputs = processor(np.random.default_rng(1).integers(0, 12_000, (8, 50)).tolist())

    def ask(**options):
        return lambda: model.recommend(**inputs, session_length=5, num_beams=50, **options)

    runs = {
        "parallel": ask(session_decoding="parallel"),
        "parallel_16": ask(session_decoding="parallel", num_return_sequences=16),
        "beam": ask(),
        "beam_item_scores": ask(item_score_weight=1.0),
        "encoder": lambda: model.get_encoder()(**inputs),
    }
    with model.packed_experts(), torch.no_grad():
        interleaved(runs, 1)  # warms up
        cpu, wall = interleaved(runs, repetitions)
    for name in runs:
        say(f"{name}: {statistics.median(cpu[name]):.3f} CPU s, {statistics.median(wall[name]):.3f} s wall")
    return [
        {**ratio_row(f"speedup_8x50x5/parallel_over_{name}", cpu, name, "parallel"), "against": name}
        for name in runs
        if name != "parallel"
    ]


def measured(setting: Setting, sessions: list[list]) -> dict[str, float]:
    """The simulator's columns of one session per test user."""
    rows = setting.users["test"]
    histories = [row["history"] for row in rows]
    items = [[int(item[5:]) for item in session] for session in sessions]
    truth = [setting.world.true_reward(row["user"], each) for row, each in zip(rows, items, strict=True)]
    return {
        "true_reward": float(np.mean(truth)),
        "judge": float(np.mean(setting.judge(histories, sessions))),
        "reward_model": float(np.mean(setting.picker(histories, sessions))),
        "distinct": float(len({item for session in sessions for item in session})),
    }


def methods(setting: Setting, sizes: Sizes) -> dict[str, dict[str, float]]:
    """The columns of each method for one seed."""
    from onerec_hf.trainers import SessionHeadArguments, fit_session_head, pick_sessions
    from onerec_hf.trainers.watching import recommended_sessions

    model = _generator(setting.processor, setting.examples, setting.seed, sizes, item_head=True)
    rows, examples = setting.users["test"], setting.examples.to_list()
    histories = [row["history"] for row in rows]

    def sessions(**options) -> list[list]:
        return recommended_sessions(model, setting.processor, rows, **options)

    def picked(**options) -> list[list]:
        drawn = sessions(num_beams=PICKED, num_return_sequences=PICKED, **options)
        places = pick_sessions(setting.picker, histories, drawn)
        return [drawn[user * PICKED + place] for user, (place,) in enumerate(places)]

    def fit(reward=None, **options) -> float:
        started = cpu_seconds()
        arguments = SessionHeadArguments(seed=setting.seed, **options)
        facts = fit_session_head(model, setting.processor, examples, reward, arguments)
        say(f"  {facts}")
        return cpu_seconds() - started

    parallel: dict[str, Any] = {"session_decoding": "parallel"}
    found = {
        "beam": measured(setting, sessions()),
        "beam_50": measured(setting, sessions(num_beams=50)),
        "beam_picked": measured(setting, picked()),
    }
    seconds = fit()
    found["parallel"] = measured(setting, sessions(**parallel)) | {"cpu_seconds": seconds}
    fit(setting.picker, unlikelihood=0.0)
    found["parallel_no_unlikely"] = measured(setting, sessions(**parallel))
    seconds = fit(setting.picker)
    found["parallel_reward"] = measured(setting, sessions(**parallel)) | {"cpu_seconds": seconds}
    found["parallel_picked"] = measured(setting, picked(**parallel))
    assert model.parallel_decoder is not None
    model.parallel_decoder.alpha = 0.0
    found["parallel_alpha_0"] = measured(setting, sessions(**parallel))
    return found


class Parts:
    """What earlier runs of this benchmark have measured, by part."""

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.found = {each["part"]: each["found"] for each in map(json.loads, lines)}

    def get(self, part: str, measure: Callable[[], Any]) -> Any:
        if part not in self.found:
            self.found[part] = measure()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"part": part, "found": self.found[part]}) + "\n")
        return self.found[part]

    def complete(self) -> None:
        if self.path is not None:
            self.path.unlink()


def simulator(parts: Parts, folder: str, seeds: list[int], sizes: Sizes) -> list[dict[str, Any]]:
    from onerec_hf.evaluation.results import result_row

    runs: dict[int, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        runs[seed] = parts.get(
            f"simulator/{seed}", lambda seed=seed: methods(load_setting(folder, seed, sizes), sizes)
        )
        for method, columns in runs[seed].items():
            values = ", ".join(f"{name} {value:.4g}" for name, value in columns.items())
            say(f"seed {seed}, {method}: {values}")
    units, rows = {"distinct": "items", "cpu_seconds": "s"}, []
    for method in runs[seeds[0]]:
        for name in runs[seeds[0]][method]:
            values = [runs[seed][method][name] for seed in seeds]
            spread = [min(values), max(values)]
            rows.append(
                result_row(
                    f"simulator/{method}/{name}", statistics.fmean(values), units.get(name, "rate"), spread=spread
                )
            )
        if method.startswith("parallel"):
            against = "beam_picked" if method == "parallel_picked" else "beam"
            ratios = [runs[seed][method]["true_reward"] / runs[seed][against]["true_reward"] for seed in seeds]
            rows.append(
                result_row(
                    f"simulator/{method}/true_reward_over_{against}",
                    statistics.fmean(ratios),
                    "ratio",
                    against=against,
                    spread=[min(ratios), max(ratios)],
                )
            )
    return rows


def main() -> None:
    quiet()
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/movielens_latest_small", help="folder of MovieLens' tables")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = options.parse_args()
    parts = Parts(Path(f"{arguments.json}.runs.jsonl") if arguments.json else None)
    rows = parts.get("speed", lambda: speed(arguments.quick, 2 if arguments.quick else 7))
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    rows += simulator(parts, arguments.data_dir, seeds, QUICK if arguments.quick else Sizes())
    finish(rows, arguments.json, settings={"users": 8, "beams": 50, "session_length": 5, "picked_among": PICKED})
    parts.complete()


if __name__ == "__main__":
    main()
