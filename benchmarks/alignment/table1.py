"""
Table 1 of the OneRec paper (arXiv 2502.18965) rebuilt on KuaiRand-Pure: pointwise and session-wise generators, and what preference alignment
adds, evaluated by the reward model that picked the pairs and by a held-out one.

    python benchmarks/alignment/table1.py --seeds 0 1 2 --jobs 2 --json benchmarks/results/alignment.json
    python benchmarks/alignment/table1.py --figure --json benchmarks/results/alignment_share.json     (reward against DPO share and iterations)

Every variant but the first three begins with the same trained OneRec and takes the same number of steps on the same examples: `ntp_only` with the
next-token loss alone, the others with preference pairs of one kind for a share of the examples. Sessions come from beam search; for SASRec and
TIGER they are the ranked lists, cut into fives. Columns are means over test users of the mean and of the largest predicted rate among a user's
sessions; `heldout/` is the judge, trained on other days by another seed. `observed/vtr` and `observed/ltr` need no model: the rate at which all
users viewed or liked the recommended items on the test days, where the log showed them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/table1.py`

from benchmarks.alignment.kuairand import SESSION_LENGTH, World, load_world
from benchmarks.alignment.preferences import align_on, quiet
from benchmarks.harness import DATA, cpu_seconds, finish, parser, say

SESSIONS, BEAMS = 8, 16  # per user, of SESSION_LENGTH items
OBJECTIVES = ("swt", "vtr", "wtr", "ltr")
# What a variant changes of the shared settings below. Losses other than IPA's get random pairs: the paper does not say which it gave them.
_LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"selection": "random"},
    "ipo": {"selection": "random", "loss_type": "ipo", "beta": 1.0},  # TRL's 0.1 asks for a margin of five nats a code
    "cdpo": {"selection": "random", "loss_type": "cdpo", "label_smoothing": 0.1},
    "rdpo": {"selection": "random", "loss_type": "robust", "label_smoothing": 0.1},
    "cpo": {"selection": "random", "loss_type": "cpo"},
    "simpo": {"selection": "random", "loss_type": "simpo", "beta": 2.0},
    "s_dpo": {"selection": "several", "loss_type": "s_dpo"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ntp_only": {"dpo_weight": 0.0},
    # With IPA's iterations: new pairs and a new reference in each epoch.
    **_LOSSES,
    # As preference optimisation is usually done: pairs drawn once, one reference (not run by default).
    **{f"{name}_once": {**settings, "iterations": 1} for name, settings in _LOSSES.items()},
    "ipa_one_iteration": {"iterations": 1},
    "ipa_2_percent": {"dpo_ratio": 0.02},
    "ipa": {},
}
TABLE = ["sasrec", "tiger", "onerec", *(name for name in VARIANTS if not name.endswith("_once"))]
SHARED: dict[str, Any] = {
    "beta": 0.1,
    "dpo_weight": 1.0,
    "dpo_ratio": 0.05,
    "num_candidates": 32,
    "candidates": "sample",
    "selection": "best_worst",
    "learning_rate": 3e-4,
}
EPOCHS, PROMPTS = 3, 4000  # IPA draws anew in each epoch


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/kuairand_pure", help="folder of KuaiRand-Pure's Parquet files")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--split", default="test", choices=("test", "validation"), help="validation to choose by")
    options.add_argument("--variants", nargs="+", default=TABLE)
    options.add_argument("--jobs", type=int, default=1, help="seeds at a time, a process each")
    options.add_argument("--figure", action="store_true", help="IPA by share of pairs and by iteration instead")
    return options.parse_args()


def train_generator(world: World, session_length: int, quick: bool):
    """A generator of `session_length` items by the next-token loss: 5 is OneRec, 1 is TIGER's pointwise objective on a dense decoder."""
    import torch

    from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    torch.manual_seed(world.seed)
    assert world.processor.catalogue is not None
    config = OneRecConfig(
        codebook_sizes=list(world.processor.catalogue.codebook_sizes),
        session_length=session_length,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64 if session_length > 1 else 128,  # two of four experts are as wide as the dense layer
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        num_experts=4 if session_length > 1 else 1,
        num_experts_per_tok=2 if session_length > 1 else 1,
    )
    model = OneRecForConditionalGeneration(config)
    windows = world.windows
    if session_length == 1:
        # One target drawn of each window, so that both generators see as many examples.
        rng = np.random.default_rng(world.seed)
        windows = windows.map(_one_target, fn_kwargs={"rng": rng})
    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch,
            num_train_epochs=2,
            max_steps=3 if quick else -1,
            per_device_train_batch_size=128,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=world.seed,
        )
        OneRecTrainer(model, args, train_dataset=windows, processing_class=world.processor).train()
    return model.eval()


def _one_target(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    place = int(rng.integers(len(row["session"])))
    return {"history": row["history"] + row["session"][:place], "session": row["session"][place : place + 1]}


def align(world: World, base, settings: dict[str, Any], epochs: int, quick: bool, on_epoch=None):
    """A copy of `base` after alignment."""
    import copy

    from onerec_hf.trainers.pair_selection import one_against

    merged = {**SHARED, **settings}
    iterations = merged.pop("iterations", epochs)
    several = merged["selection"] == "several"
    merged["selection"] = "random" if several else merged["selection"]
    if quick:
        merged["num_candidates"] = 8
    prompts = world.prompts.select(range(min(64 if quick else PROMPTS, len(world.prompts))))
    merged |= {
        "num_train_epochs": epochs,
        "epochs_per_iteration": -(-epochs // iterations),
        "candidate_length": SESSION_LENGTH,
    }
    model = copy.deepcopy(base)
    align_on(
        model,
        world.picker.reward,
        prompts,
        world.processor,
        world.seed,
        {**merged, "use_cpu": True, "logging_strategy": "no"},
        selection=one_against(3) if several else None,
        callbacks=None if on_epoch is None else [on_epoch],
    )
    return model.eval()


def generated(world: World, model, histories: list[list], tiger: bool) -> list[list[list]]:
    """Per user SESSIONS sessions of items."""
    sessions: list[list[list]] = []
    with model.packed_experts():
        for start in range(0, len(histories), 64):
            some = histories[start : start + 64]
            width = SESSIONS * SESSION_LENGTH if tiger else SESSIONS
            out = model.recommend(
                **world.processor(some),
                num_beams=width if tiger else BEAMS,
                num_return_sequences=width,
                session_length=1 if tiger else SESSION_LENGTH,
                exclude=some,
            )
            made = world.processor.batch_decode(out)
            if tiger:
                made = _in_fives([item for session in made for item in session])
            sessions += [made[place * SESSIONS : (place + 1) * SESSIONS] for place in range(len(some))]
    return sessions


def _in_fives(items: list) -> list[list]:
    return [items[start : start + SESSION_LENGTH] for start in range(0, len(items), SESSION_LENGTH)]


def ranked(world: World, model, histories: list[list], k: int = 10) -> np.ndarray:
    """(users, k) rows of single items, as OneRecTrainer's evaluation ranks them."""
    parts = []
    with model.packed_experts():
        for start in range(0, len(histories), 128):
            some = histories[start : start + 128]
            out = model.recommend(
                **world.processor(some), num_beams=2 * k, num_return_sequences=k, session_length=1, exclude=some
            )
            parts.append(world.processor.item_indices(out).view(len(some), k).numpy())
    return np.concatenate(parts)


def evaluate_sessions(world: World, sessions: list[list[list]], top: np.ndarray, split: str) -> dict[str, float]:
    """The table's columns for one variant and seed."""
    from onerec_hf.evaluation.metrics import recall_at_k

    rows = world.users[split]
    histories, found = rows["history"][:], {}
    flat = [session for user in sessions for session in user]
    owners = [history for history in histories for _ in range(SESSIONS)]
    for prefix, model in (("", world.picker), ("heldout/", world.judge)):
        rates = model.predict(owners, flat).numpy().reshape(len(histories), SESSIONS, -1)
        for k, objective in enumerate(model.config.objectives):
            found[f"{prefix}{objective}_mean"] = float(rates[..., k].mean())
            found[f"{prefix}{objective}_max"] = float(rates[..., k].max(1).mean())
    items = np.array([item for session in flat for item in session])
    shown = world.observed.reindex(items)
    for objective in ("vtr", "ltr"):
        found[f"observed/{objective}"] = float(shown[objective].mean())
    found["observed/shown"] = float(shown["vtr"].notna().mean())
    found["distinct_items"] = float(len(np.unique(items)))
    relevant = [world.processor.catalogue.indices(session) for session in rows["session"]]
    found["recall@10"] = float(recall_at_k(top, relevant, 10))
    return found


def run_variant(world: World, name: str, base, split: str, quick: bool) -> dict[str, float]:
    histories = world.users[split]["history"][:]
    catalogue = world.processor.catalogue
    assert catalogue is not None
    if name == "sasrec":
        from onerec_hf.trainers import fit_sequential

        model = fit_sequential(
            world.sequences[: 300 if quick else None],
            item_ids=catalogue.item_ids,
            scale_embeddings=False,
            max_history=30,
            num_train_epochs=1 if quick else 6,
            target_share=0.25,
            seed=world.seed,
            use_cpu=True,
        )
        top = model.rank([catalogue.indices(history) for history in histories], SESSIONS * SESSION_LENGTH)
        sessions = [_in_fives(catalogue.ids(user)) for user in top]
        return evaluate_sessions(world, sessions, top[:, :10], split)
    if name == "tiger":
        model = train_generator(world, 1, quick)
    elif name == "onerec":
        model = base
    else:
        model = align(world, base, VARIANTS[name], EPOCHS, quick)
    return evaluate_sessions(
        world, generated(world, model, histories, name == "tiger"), ranked(world, model, histories), split
    )


def within_user_auc(world: World) -> dict[str, float]:
    """How often each reward model ranks two test windows of one user right: what picking among one user's candidates asks of it."""
    from onerec_hf.data import label_matrix
    from onerec_hf.evaluation.reward_metrics import reward_metrics, within_group_concordance

    test = world.test_windows
    labels, users, found = label_matrix(test), np.array(test["user_id"][:]), {}
    for name, model in (("picker", world.picker), ("judge", world.judge)):
        p = model.predict(test["history"][:], test["session"][:]).double().numpy()
        scores = reward_metrics(labels, p, model.config.objectives, model.config.base_rates)
        for k, objective in enumerate(model.config.objectives):
            found[f"{name}/{objective}/auc"] = scores[f"{objective}/auc"]
            found[f"{name}/{objective}/within_user_auc"] = within_group_concordance(labels[:, k], p[:, k], users)[0]
    return found


def measure(options, seed: int) -> dict[str, float]:
    """All columns of all variants for one seed."""
    quiet()
    started = cpu_seconds()
    world = load_world(options.data_dir, seed, options.quick)
    measured = within_user_auc(world)
    base = train_generator(world, SESSION_LENGTH, options.quick)
    say(f"seed {seed}: data, reward models and OneRec in {cpu_seconds() - started:.0f} CPU s")
    for name in options.variants:
        started = cpu_seconds()
        found = run_variant(world, name, base, options.split, options.quick)
        measured |= {f"{name}/{column}": value for column, value in found.items()}
        heldout = ", ".join(f"{o} {found[f'heldout/{o}_mean']:.4f}" for o in OBJECTIVES)
        say(
            f"  seed {seed} {name}: {heldout}, recall@10 {found['recall@10']:.4f} ({cpu_seconds() - started:.0f} CPU s)"
        )
    return measured


def table(options) -> list[dict[str, Any]]:
    """Result rows: mean over seeds, with the smallest and largest; and the standard deviation as a separate row."""
    from onerec_hf.evaluation.results import result_row

    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(measure, [options] * len(options.seeds), options.seeds))
    else:
        runs = [measure(options, seed) for seed in options.seeds]
    rows = []
    for name in runs[0]:
        values = [run[name] for run in runs]
        unit = "items" if name.endswith("/distinct_items") else "rate"
        rows.append(result_row(name, statistics.fmean(values), unit, spread=[min(values), max(values)]))
        if len(values) > 1:
            rows.append(result_row(f"{name}/std", statistics.stdev(values), unit))
    return rows


def figure(options) -> list[dict[str, Any]]:
    """Held-out reward against the share of examples with a pair, and after each iteration, one seed."""
    from transformers import TrainerCallback

    from onerec_hf.evaluation.results import result_row

    seed = options.seeds[0]
    world = load_world(options.data_dir, seed, options.quick)
    base, rows = train_generator(world, SESSION_LENGTH, options.quick), []
    histories = world.users[options.split]["history"][:]

    def add(name: str, model) -> None:
        found = evaluate_sessions(
            world, generated(world, model, histories, False), ranked(world, model, histories), options.split
        )
        rows.extend(result_row(f"{name}/{column}", value, "rate") for column, value in found.items())
        say(f"  {name}: heldout swt {found['heldout/swt_mean']:.4f}, ltr {found['heldout/ltr_mean']:.4f}")

    class AfterEachEpoch(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            done = round(state.epoch)
            add(f"iteration_{done}", model)
            if done == EPOCHS:  # the same training as that of the other shares
                add(f"share_{SHARED['dpo_ratio']:g}", model)

    add("share_0", align(world, base, VARIANTS["ntp_only"], EPOCHS, options.quick))
    for share in (0.005, 0.01, 0.02):
        add(f"share_{share:g}", align(world, base, {"dpo_ratio": share}, EPOCHS, options.quick))
    add("iteration_0", base)
    align(world, base, {}, EPOCHS if options.quick else 5, options.quick, AfterEachEpoch())
    if options.json:
        plot(rows, Path(options.json).with_suffix(".png"))
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    values = {row["name"]: row["value"] for row in rows}
    panels = {"share_": "share of examples with a pair", "iteration_": "iterations of alignment"}
    made, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (kind, label) in zip(axes, panels.items(), strict=True):
        points = sorted({float(name.split("/")[0].removeprefix(kind)) for name in values if name.startswith(kind)})
        for prefix, who in (("", "picking model"), ("heldout/", "held-out judge")):
            y = [values[f"{kind}{point:g}/{prefix}swt_mean"] for point in points]
            axis.plot(range(len(points)), y, marker="o", label=who)
        axis.set_xticks(range(len(points)), [f"{p:.1%}" if kind == "share_" else f"{p:g}" for p in points])
        axis.set_xlabel(label)
    axes[0].set_ylabel("session watch time (swt), mean")
    axes[0].legend()
    made.tight_layout()
    made.savefig(path, dpi=120)
    say(f"wrote {path}")


def main() -> None:
    options = arguments()
    quiet()
    started = time.perf_counter()
    rows = figure(options) if options.figure else table(options)
    settings = {"sessions": SESSIONS, "beams": BEAMS, "epochs": EPOCHS, "prompts": PROMPTS, **SHARED}
    protocol = (
        f"KuaiRand-Pure (CC BY-SA 4.0), {options.split} users: 1,000 of those with two long views on 6 to 8 May 2022 (others chose the "
        "settings). Picking reward model: 25 to 30 April; judge: 1 to 5 May, another seed."
    )
    finish(
        rows,
        options.json,
        protocol=protocol,
        settings=settings,
        variants={name: VARIANTS[name] for name in options.variants if name in VARIANTS},
        seeds=options.seeds,
        wall_seconds=round(time.perf_counter() - started),
    )


if __name__ == "__main__":
    main()
