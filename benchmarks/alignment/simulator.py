"""
Alignment where the truth is known: every method against simulated users over MovieLens movies (`simulated_world.py`), at equal rollouts and equal steps.

    python benchmarks/alignment/simulator.py --json benchmarks/results/simulator.json
    python benchmarks/alignment/simulator.py --quick

A small OneRec learns the next watched movies from a log of an imperfect policy; a reward model learns from half of the users of the log what share of
a session is watched, a judge from the other half. Every method begins with that OneRec and takes 200 steps, in which 6,400 sessions are drawn and
scored; `ntp` takes the same steps on next tokens alone, and `best_of_n` lets the reward model choose among as many sessions of it. Columns are of test
users: the true reward (expected share of a session that is watched), also as a share of the way from `ntp` to the best session (`closed`), the judge's and
the reward model's prediction, recall@10 of what they watched next, and the number of distinct movies in all sessions. `diverged` is the share of
runs that end below the OneRec that they began with, or with a non-finite loss, at 1, 4 and 16 times the learning rate.

Runs are kept in PATH.runs.jsonl until the table is complete, so that a killed benchmark resumes.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/simulator.py`

from benchmarks.alignment.preferences import align_on, quiet
from benchmarks.alignment.simulated_reward import LoggedReward
from benchmarks.alignment.simulated_world import SESSION_LENGTH, World, logged_sessions, movielens_world
from benchmarks.harness import DATA, cpu_seconds, finish, parser, say

FACTORS = (1, 4, 16)  # of the learning rate
LEARNING_RATE = 5e-4
BATCH, CANDIDATES, GROUP, SESSIONS_PER_STEP = 16, 32, 16, 32
DPO = {"dpo_ratio": 0.25, "num_candidates": CANDIDATES, "candidates": "sample", "beta": 0.1}
IPA = {**DPO, "iterations": 4}
POLICY = ("grpo", "ecpo", "gbpo")
METHODS: dict[str, dict[str, Any]] = {
    "ntp": {"dpo_weight": 0.0, "dpo_ratio": 1e-9, "num_candidates": 2},
    "ipa": IPA,
    "ecpo": {"loss_type": "ecpo"},
    "ipa_guarded": {**IPA, "guarded": True},
    "ecpo_guarded": {"loss_type": "ecpo", "guarded": True},
    "best_of_n": {},
    "dpo_once": DPO,
    "gbpo": {"loss_type": "gbpo"},
    "s_dpo": {**DPO, "loss_type": "s_dpo"},
    "grpo": {"loss_type": "grpo"},
}


@dataclass
class Sizes:
    users: int = 1350
    items: int = 500
    sessions: int = 12
    test: int = 400
    watched: int = 150
    codes: int = 32
    steps: int = 200
    generator_epochs: float = 4


QUICK = Sizes(120, 60, 6, 20, 20, 8, 4, 1)


@dataclass
class Setting:
    """World, data, reward models and the generator of one seed."""

    seed: int
    sizes: Sizes
    world: World
    processor: Any
    examples: Any
    users: dict[str, list[dict[str, Any]]]  # "test", "validation": user, history, session (watched next)
    picker: Any
    judge: Any
    base: Any
    optimum: float


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/movielens_latest_small", help="folder of MovieLens' tables")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--factors", type=int, nargs="+", default=list(FACTORS))
    return options.parse_args()


# -- the setting -----------------------------------------------------------------------------
def load_setting(folder: str, seed: int, sizes: Sizes) -> Setting:
    from datasets import Dataset

    from onerec_hf import OneRecProcessor
    from onerec_hf.semantic_ids import fit_semantic_ids

    world, _ = movielens_world(folder, sizes.users, sizes.items, seed)
    log = logged_sessions(world, sizes.sessions, seed)
    ids = [f"movie{item}" for item in range(sizes.items)]
    fitted = fit_semantic_ids(ids, world.items.astype(np.float32), [sizes.codes] * 3, seed=seed)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=30)
    held_out = sizes.test + sizes.watched
    users = [_held_out(user, log[user], ids) for user in range(held_out)]
    users = [row for row in users if row["history"] and row["session"]]
    train = range(held_out, sizes.users)
    examples = [row for user in train for row in _windows(log[user], ids)]
    picker, judge = (_reward_model(world, ids, [log[user] for user in train[part::2]]) for part in (0, 1))
    found: dict[str, list[dict[str, Any]]] = {
        "test": [row for row in users if row["user"] < sizes.test],
        "validation": [row for row in users if row["user"] >= sizes.test],
    }
    best = [world.optimum(row["user"], [int(item[5:]) for item in row["history"]])[0] for row in found["test"]]
    dataset = Dataset.from_list(examples).shuffle(seed=seed)
    base = _generator(processor, dataset, seed, sizes)
    return Setting(seed, sizes, world, processor, dataset, found, picker, judge, base, float(np.mean(best)))


def _watched(sessions: list, ids: list[str]) -> list[str]:
    return [ids[item] for shown, seen in sessions for item, yes in zip(shown, seen, strict=True) if yes]


def _held_out(user: int, log: list, ids: list[str]) -> dict[str, Any]:
    return {"user": user, "history": _watched(log[:-2], ids), "session": _watched(log[-2:], ids)}


def _windows(log: list, ids: list[str]) -> list[dict[str, Any]]:
    """The next movies after each history of at least two."""
    items = _watched(log, ids)
    starts = range(2, len(items) - SESSION_LENGTH + 1)
    return [{"history": items[:start], "session": items[start : start + SESSION_LENGTH]} for start in starts]


def _reward_model(world: World, ids: list[str], logs: list):
    """A reward function of item ids, learned from the logs of some users."""
    rows = [
        ([item for shown, seen in log[:place] for item, yes in zip(shown, seen, strict=True) if yes], *log[place])
        for log in logs
        for place in range(1, len(log))
    ]
    model, places = LoggedReward(world.items, rows), {name: place for place, name in enumerate(ids)}

    def reward(histories: list[list], sessions: list[list]) -> list[float]:
        indices = [[[places[item] for item in row] for row in part] for part in (histories, sessions)]
        return model.score(*indices).tolist()

    return reward


_SILENT: dict[str, Any] = {
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def _generator(processor, examples, seed: int, sizes: Sizes, item_head: bool = False):
    import torch

    from onerec_hf import ItemHeadConfig, OneRecConfig, OneRecForConditionalGeneration
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    torch.manual_seed(seed)
    config = OneRecConfig(
        codebook_sizes=list(processor.catalogue.codebook_sizes),
        session_length=SESSION_LENGTH,
        hidden_size=32,
        intermediate_size=64,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_experts=1,
        num_experts_per_tok=1,
        item_head=ItemHeadConfig(num_items=len(processor.catalogue), loss_weight=1.0) if item_head else None,
    )
    model = OneRecForConditionalGeneration(config)
    if item_head:
        model.set_catalogue(processor.catalogue)
    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch,
            num_train_epochs=sizes.generator_epochs,
            per_device_train_batch_size=64,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            seed=seed,
            **_SILENT,
        )
        OneRecTrainer(model, args, train_dataset=examples, processing_class=processor).train()
    return model.eval()


# -- methods ---------------------------------------------------------------------------------
def aligned(setting: Setting, method: str, factor: int):
    """A copy of the generator after a method's training; None where its loss is not finite."""
    from onerec_hf.trainers import NonFiniteError

    model = copy.deepcopy(setting.base)
    try:
        settings = dict(METHODS[method])
        guards: dict[str, Any] = {}
        if settings.pop("guarded", False):
            guards = {"judge_funcs": setting.judge, "guard_dataset": setting.users["validation"]}
        train = _optimise if settings.get("loss_type") in POLICY else _prefer
        train(setting, model, settings, factor, guards)
    except NonFiniteError:
        return None
    return model.eval()


def _prefer(setting: Setting, model, settings: dict[str, Any], factor: int, guards: dict[str, Any]) -> None:
    from onerec_hf.trainers.pair_selection import one_against

    iterations = settings.pop("iterations", 1)
    epochs, steps = 4, setting.sizes.steps
    settings["dpo_ratio"] = settings["dpo_ratio"] / iterations
    align_on(
        model,
        setting.picker,
        setting.examples.select(range(min(BATCH * steps // epochs, len(setting.examples)))),
        setting.processor,
        setting.seed,
        {
            **settings,
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": epochs,
            "max_steps": steps,
            "epochs_per_iteration": epochs // iterations,
            "learning_rate": LEARNING_RATE * factor,
            "use_cpu": True,
            "logging_strategy": "no",
        },
        selection=one_against(3) if settings.get("loss_type") == "s_dpo" else None,
        **guards,
    )


def _optimise(setting: Setting, model, settings: dict[str, Any], factor: int, guards: dict[str, Any]) -> None:
    from onerec_hf.trainers import OneRecGRPOConfig, OneRecGRPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecGRPOConfig(
            scratch,
            **settings,
            per_device_train_batch_size=SESSIONS_PER_STEP,
            num_generations=GROUP,
            max_steps=setting.sizes.steps,
            ntp_batch_size=BATCH,
            learning_rate=LEARNING_RATE * factor,
            lr_scheduler_type="constant",
            bf16=False,
            activation_checkpointing=False,
            seed=setting.seed,
            **_SILENT,
        )
        OneRecGRPOTrainer(
            model,
            setting.picker,
            args=args,
            train_dataset=setting.examples,
            processing_class=setting.processor,
            **guards,
        ).train()


# -- measuring -------------------------------------------------------------------------------
def measured(setting: Setting, model, best_of: bool = False) -> dict[str, float]:
    """The table's columns of what a model recommends to the test users."""
    from onerec_hf.trainers.watching import measured as watched
    from onerec_hf.trainers.watching import recommended_sessions

    rows, processor = setting.users["test"], setting.processor
    histories = [row["history"] for row in rows]
    found = watched(model, processor, rows, {"judge": [setting.judge], "reward_model": [setting.picker]}, True)
    sessions = recommended_sessions(model, processor, rows)
    if best_of:
        sessions = _best_of(setting, model)
        found["judge"] = float(np.mean(setting.judge(histories, sessions)))
        found["reward_model"] = float(np.mean(setting.picker(histories, sessions)))
    items = [[int(item[5:]) for item in session] for session in sessions]
    truth = [setting.world.true_reward(row["user"], each) for row, each in zip(rows, items, strict=True)]
    found.pop("variety")
    return {"true_reward": float(np.mean(truth)), **found, "distinct": float(len({i for s in items for i in s}))}


def _best_of(setting: Setting, model) -> list[list]:
    import torch

    rows, best = setting.users["test"], []
    with model.packed_experts():
        for start in range(0, len(rows), 50):
            some = [row["history"] for row in rows[start : start + 50]]
            drawn = model.recommend(
                **setting.processor(some),
                num_beams=CANDIDATES,
                num_return_sequences=CANDIDATES,
                exclude=some,
                do_sample=True,
                generator=torch.Generator().manual_seed(setting.seed),
            )
            sessions = setting.processor.batch_decode(drawn)
            scores = setting.picker([history for history in some for _ in range(CANDIDATES)], sessions)
            places = np.asarray(scores).reshape(len(some), CANDIDATES).argmax(1)
            best += [sessions[place * CANDIDATES + int(chosen)] for place, chosen in enumerate(places)]
    return best


def run(setting: Setting, method: str, factor: int) -> dict[str, Any]:
    if method == "best_of_n":
        control = aligned(setting, "ntp", 1)
        values = measured(setting, control, best_of=True)
    elif method == "base":
        values = measured(setting, setting.base) | {"optimum": setting.optimum}
    else:
        model = aligned(setting, method, factor)
        values = {} if model is None else measured(setting, model)
    return {"seed": setting.seed, "method": method, "factor": factor, **values}


def wanted(options) -> list[tuple[int, str, int]]:
    """Every run: seed, method, factor of the learning rate; first all seeds at the learning rate itself."""
    first = [(seed, method, 1) for seed in options.seeds for method in ("base", *options.methods)]
    tried = [method for method in options.methods if method not in ("ntp", "best_of_n")]
    factors = [factor for factor in options.factors if factor != 1]
    return first + [(seed, method, factor) for factor in factors for seed in options.seeds for method in tried]


def main() -> None:
    quiet()
    options = arguments()
    sizes = QUICK if options.quick else Sizes()
    kept = Path(f"{options.json}.runs.jsonl") if options.json else None
    runs = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    done = {(each["seed"], each["method"], each["factor"]) for each in runs}
    settings: dict[int, Setting] = {}
    for seed, method, factor in wanted(options):
        if (seed, method, factor) in done:
            continue
        started = cpu_seconds()
        if seed not in settings:
            settings[seed] = load_setting(options.data_dir, seed, sizes)
            say(f"seed {seed}: {len(settings[seed].examples):,} examples, {cpu_seconds() - started:.0f} CPU s")
            started = cpu_seconds()
        found = run(settings[seed], method, factor) | {"cpu_seconds": cpu_seconds() - started}
        runs.append(found)
        say("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
        if kept:
            with kept.open("a") as file:
                file.write(json.dumps(found) + "\n")
    finish(table(runs), options.json)
    if kept:
        kept.unlink()


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Result rows `METHOD/COLUMN`: mean over seeds, smallest and largest; `gain` is paired with `ntp` of the same seed, with a t-test."""
    from scipy.stats import ttest_1samp

    from onerec_hf.evaluation.results import result_row

    at = {(each["method"], each["factor"], each["seed"]): each for each in runs}
    seeds = sorted({each["seed"] for each in runs})
    rows = []
    for method in dict.fromkeys(each["method"] for each in runs):
        first = [at[method, 1, seed] for seed in seeds if (method, 1, seed) in at]
        columns: dict[str, list[float]] = {
            name: [each[name] for each in first if name in each]
            for name in ("true_reward", "judge", "reward_model", "recall@10", "distinct", "optimum", "cpu_seconds")
        }
        controls = {seed: at["ntp", 1, seed] for seed in seeds if at.get(("ntp", 1, seed))}
        paired = [
            (each, controls[each["seed"]]) for each in first if "true_reward" in each and each["seed"] in controls
        ]
        if method not in ("ntp", "base"):
            columns["gain"] = [each["true_reward"] - control["true_reward"] for each, control in paired]
            columns["closed"] = [
                (each["true_reward"] - control["true_reward"])
                / (at["base", 1, each["seed"]]["optimum"] - control["true_reward"])
                for each, control in paired
            ]
            if len(paired) > 1:
                test: Any = ttest_1samp(columns["gain"], 0.0, alternative="greater")
                rows.append(result_row(f"{method}/gain/p", float(test.pvalue), "p-value"))
        for name, values in columns.items():
            if values:
                rows.append(
                    result_row(
                        f"{method}/{name}", statistics.fmean(values), _UNITS.get(name, "rate"), spread=_span(values)
                    )
                )
                if len(values) > 1:
                    rows.append(result_row(f"{method}/{name}/std", statistics.stdev(values), _UNITS.get(name, "rate")))
        for factor in sorted({each["factor"] for each in runs if each["method"] == method}):
            if method in ("base", "best_of_n"):
                continue
            mine = [at[method, factor, seed] for seed in seeds if (method, factor, seed) in at]
            failed = [each.get("true_reward", -1.0) < at["base", 1, each["seed"]]["true_reward"] for each in mine]
            rows.append(result_row(f"{method}/diverged/x{factor}", statistics.fmean(failed), "share"))
            left = [each["true_reward"] for each in mine if "true_reward" in each]
            if factor != 1 and left:
                rows.append(
                    result_row(f"{method}/true_reward/x{factor}", statistics.fmean(left), "rate", spread=_span(left))
                )
    return rows


_UNITS = {"distinct": "items", "cpu_seconds": "s", "closed": "share"}


def _span(values: list[float]) -> list[float]:
    return [min(values), max(values)]


if __name__ == "__main__":
    main()
