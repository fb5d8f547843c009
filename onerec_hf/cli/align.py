"""`onerec-hf align`: a trained generator to one that a reward, or given preferences, prefers; the artefact and its results before and after."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.cli.arguments import DataArguments, OutputArguments, command_line, parse
from onerec_hf.cli.train import evaluate_beside_baselines, resumable
from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.modeling.files import replacing
from onerec_hf.modeling.files import listed
from onerec_hf.workflows.distributed import all_ranks, is_first
from onerec_hf.workflows.run_folder import begin, finish, open_folder
from onerec_hf.workflows.sharding import ShardingArguments
from onerec_hf.workflows.steps import (
    PreparedData,
    check_catalogue,
    find_origin,
    load_model,
    load_processor,
    naming,
    prepare_data,
    save_trained,
    say,
    table,
    write_bytes,
    write_origin,
)

if TYPE_CHECKING:
    import datasets

    from onerec_hf.hub_cards import Alignment
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

PAIRS_NAME = "pairs/pairs.parquet"
REWARDED_USERS = 1000


@dataclass
class AlignArguments(OutputArguments):
    """What is aligned, and with what."""

    model: str | None = field(default=None, metadata={"help": "A trained OneRec to go on from: folder or Hub id."})
    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward models that judge the generated sessions: folders or Hub ids."}
    )
    preferences: str | None = field(
        default=None,
        metadata={"help": ".jsonl or .parquet of history, chosen, rejected (lists of item ids) in place of a reward."},
    )
    judge: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models that pick no pair, only say before and after what they think of the generated sessions."
        },
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Training examples to align on, drawn at random; all when not given."}
    )
    evaluate: bool = field(
        default=True, metadata={"help": "Rank the test items before and after, beside popularity and item-kNN."}
    )


def main(argv: list[str]) -> None:
    from onerec_hf.hub_cards import Alignment, Training, write_generator_card
    from onerec_hf.trainers import OneRecDPOConfig
    from onerec_hf.trainers.sharding import unsharded_model

    args, data_args, sharding, training_args = parse(
        (AlignArguments, DataArguments, ShardingArguments, OneRecDPOConfig), argv, "align", required=["--output_dir"]
    )
    sharding.check(training_args)
    if args.model is None:
        raise ValueError("give --model: the folder or Hub id of a trained OneRec")
    if args.max_examples is not None and args.max_examples < 1:
        raise ValueError(f"--max_examples must be at least 1; got {args.max_examples}")
    if (args.reward is None) == (args.preferences is None):
        raise ValueError(
            "give either --reward, models that judge generated sessions, or --preferences, a file of pairs"
        )
    both = {os.path.realpath(path) for path in args.reward or []} & {
        os.path.realpath(path) for path in args.judge or []
    }
    if both:
        raise ValueError(f"--judge {sorted(both)[0]} is a --reward too: a judge is a model that picks no pair")
    folder, command = Path(training_args.output_dir), command_line("align", argv)
    goes_on = open_folder(folder, args.overwrite, training_args)
    if folder.resolve() == Path(args.model).resolve():
        raise ValueError(f"--output_dir {folder} is the model itself; name another folder")
    started = time.perf_counter()
    processor, model = load_processor("--model", args.model), load_model("--model", args.model)
    preferences = None if args.preferences is None else read_preferences(args.preferences, processor)
    rewards = [load_reward(path) for path in args.reward or []]
    data = prepare_data(data_args)
    check_catalogue(f"--model {args.model}", processor, data)
    # A reward that picked the pairs rises by itself; whether anything is better, one that did not can tell.
    judges = {"reward": rewards, "heldout_reward": [load_reward(path, "--judge") for path in args.judge or []]}
    judges = {name: models for name, models in judges.items() if models}
    before = ranking_rows(model, processor, data, training_args.use_cpu) if args.evaluate else []
    judged = reward_rows(model, processor, judges, data, "before") if args.evaluate else []
    training_args.output_dir = str(folder / "checkpoints")
    examples = data.split.train if preferences is None else preferences
    if args.max_examples is not None and args.max_examples < len(examples):
        drawn = np.random.default_rng(training_args.seed).choice(len(examples), args.max_examples, replace=False)
        examples = examples.select(np.sort(drawn))
    trainer: Any = make_trainer(sharding.shard(model), rewards, training_args, processor, examples)
    if rewards:
        keep_pairs(trainer)
    origin = find_origin(args.model)
    begin(folder, command, goes_on)
    write_origin(folder, origin)
    with resumable(folder, command), contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        save_trained(trainer, folder)
    after = []
    if args.evaluate:
        with unsharded_model(trainer.model) as aligned:
            after = ranking_rows(aligned, processor, data, training_args.use_cpu)
            judged += reward_rows(aligned, processor, judges, data, "after")
    if not is_first():
        return
    alignment = save_pairs(kept_pairs(trainer), folder, trainer, data, command) if rewards else Alignment.of(trainer)
    rows = [{**row, "name": f"before/{row['name']}"} for row in before if row["name"].startswith("onerec/")] + after
    rows += judged
    rows.append(result_row("seconds", time.perf_counter() - started, "s"))
    write_results(
        folder / "results.json",
        rows,
        command=command,
        seed=training_args.seed,
        dataset=data.source.name,
        protocol=data.protocol,
    )
    write_generator_card(
        folder,
        processor,
        trainer.model,
        data.source,
        data.protocol,
        rows,
        counts=data.counts(),
        training=Training.of(trainer),
        alignment=alignment,
        command=command,
    )
    finish(folder)
    say(f"saved to {folder}")
    if args.evaluate:
        print_before_and_after(before, after)
        print_rewards(judged)


def read_preferences(path: str, processor: OneRecProcessor) -> datasets.Dataset:
    """
    Rows of history, chosen and rejected from a JSON lines or Parquet file.

    Raises:
        ValueError: another kind of file, missing columns, no rows, or items that the catalogue lacks.
    """
    from datasets import Dataset

    from onerec_hf.data.tables import load_table

    where, wanted = f"--preferences {path}", ["history", "chosen", "rejected"]
    if Path(path).suffix not in (".jsonl", ".parquet") or not Path(path).is_file():
        raise ValueError(f"{where}: name an existing .jsonl or .parquet file")
    table = load_table(path)
    if any(column not in table.columns for column in wanted):
        raise ValueError(
            f"{where}: {len(table)} rows with {listed(table.columns)}; it needs rows with {', '.join(wanted)}"
        )
    columns = {column: [_items_of(value) for value in table[column]] for column in wanted}
    for column, rows in columns.items():
        bad = [row for row, items in enumerate(rows) if items is None]
        if bad:
            raise ValueError(
                f"{where}: {column!r} is no list of item ids in {len(bad)} of {len(rows)} rows (first: row {bad[0]}, counting from 0)"
            )
    assert processor.catalogue is not None
    items = [item for rows in columns.values() for items in rows for item in items or ()]
    try:
        unknown = (processor.catalogue.rows(items, unknown="mask") < 0).sum()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if unknown:
        raise ValueError(
            f"{where}: {unknown} of {len(items)} items are not in the model's catalogue; leave these rows out"
        )
    return Dataset.from_dict(columns)


def _items_of(value: Any) -> list | None:
    """A table's cell as a list of items, or None where it is none."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return value if isinstance(value, list) else None


def load_reward(path: str, option: str = "--reward"):
    from transformers import AutoModelForSequenceClassification

    from onerec_hf.modeling.hub import check_complete
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

    with naming(option, path):
        model, loaded = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        check_complete(loaded)
        if not isinstance(model, OneRecForSessionReward):
            raise ValueError(f"it holds a {type(model).__name__}, no OneRec reward model")
        return model


def make_trainer(model, rewards: list, args, processor: OneRecProcessor, examples: datasets.Dataset):
    """The trainer that draws its own pairs, or the one that takes them as they are given."""
    from onerec_hf.trainers import OneRecDPOTrainer, Seq2SeqDPOTrainer

    if not rewards:
        args.remove_unused_columns = True
        return Seq2SeqDPOTrainer(model, args=args, train_dataset=examples, processing_class=processor)
    say(f"{len(examples):,} examples, pairs for {args.dpo_ratio:.1%} of them in each iteration")
    return OneRecDPOTrainer(model, rewards, args=args, train_dataset=examples, processing_class=processor)


def keep_pairs(trainer) -> None:
    """Has each iteration's pairs written beside the checkpoints, for `kept_pairs`: by itself the trainer keeps the last iteration's."""
    from transformers import TrainerCallback

    class KeepPairs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            path = Path(str(args.output_dir), f"pairs-{trainer.iteration}.json")
            if args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, json.dumps(trainer.pairs.to_list()).encode())

    trainer.add_callback(KeepPairs())


def kept_pairs(trainer) -> list[dict[str, Any]]:
    """The rows of all iterations' pairs, also of those before the training was resumed."""
    paths = [Path(trainer.args.output_dir, f"pairs-{iteration}.json") for iteration in range(trainer.iteration + 1)]
    return [row for path in paths if path.exists() for row in json.loads(path.read_text())]


def save_pairs(rows: list[dict[str, Any]], folder: Path, trainer, data: PreparedData, command: str) -> Alignment:
    """Saves the pairs of all iterations, a data set with a card of its own, where there are any; returns what the cards say of them."""
    from datasets import Dataset

    from onerec_hf.hub_cards import Alignment, write_preferences_card

    pairs = Dataset.from_list(rows)
    alignment = Alignment.of(trainer, pairs)
    if rows:
        path = folder / PAIRS_NAME
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            pairs.to_parquet(temporary)
        write_preferences_card(
            path.parent,
            pairs,
            alignment,
            catalogue_hash=trainer.processing_class.catalogue.hash,
            data=f"{data.source.description} {data.protocol}",
            command=command,
        )
    return alignment


def ranking_rows(model, processor: OneRecProcessor, data: PreparedData, use_cpu: bool) -> list[dict[str, Any]]:
    """
    Result rows on the test split, beside the baselines.

    Args:
        use_cpu: as the training is told: the last arguments that are made decide how the processes are joined.
    """
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch, per_device_eval_batch_size=64, report_to="none", disable_tqdm=True, use_cpu=use_cpu
        )
        trainer = OneRecTrainer(model, args, processing_class=processor)
        return evaluate_beside_baselines(trainer, data, "test")


def session_reward(model, processor: OneRecProcessor, histories: list[list], rewards: list) -> float:
    """Mean over users of the sum of the rewards of the session that the model recommends; ranks share the users."""
    ranks = all_ranks()
    mine = histories if ranks is None else histories[ranks.share(len(histories))]
    worth = _session_rewards(model, processor, mine, rewards)
    parts = [worth] if ranks is None else ranks.gather_objects(worth)
    return float(np.concatenate(parts).mean())


def _session_rewards(model, processor: OneRecProcessor, histories: list[list], rewards: list) -> np.ndarray:
    """(users,) float64."""
    with model.eval().packed_experts():
        parts = [
            processor.batch_decode(model.recommend(**processor(some), num_beams=10, exclude=some))
            for some in (histories[start : start + 64] for start in range(0, len(histories), 64))
        ]
    sessions = [session for part in parts for session in part]
    return np.sum([reward.reward(histories, sessions) for reward in rewards], axis=0) if histories else np.zeros(0)


def reward_rows(
    model, processor: OneRecProcessor, judges: dict[str, list], data: PreparedData, when: str
) -> list[dict[str, Any]]:
    """Result rows `<judge>/before` or `/after`: the mean reward of sessions for test users."""
    histories = data.split.test[:REWARDED_USERS]["history"]
    return [
        result_row(f"{name}/{when}", session_reward(model, processor, histories, rewards), "reward")
        for name, rewards in judges.items()
    ]


def print_rewards(rows: list[dict[str, Any]]) -> None:
    """The mean reward of generated sessions before and after, a line per kind of judge."""
    values = {row["name"]: row["value"] for row in rows}
    for name, who in (
        ("reward", "the reward that picked the pairs"),
        ("heldout_reward", "the judge, which picked none"),
    ):
        if f"{name}/before" in values:
            print(
                f"mean reward of a session by {who}: {values[f'{name}/before']:.4f} -> {values[f'{name}/after']:.4f}"
            )


def print_before_and_after(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """The metrics as a table: the baselines, the model as it was, the model as it is."""
    metrics = [row["name"].split("/")[1] for row in after if row["name"].startswith("onerec/")]
    was, now = ({row["name"]: row["value"] for row in rows} for rows in (before, after))
    lines = [[name, *(f"{now[f'{name}/{metric}']:.4f}" for metric in metrics)] for name in ("popularity", "item_knn")]
    for name, values in (("before", was), ("aligned", now)):
        lines.append([name, *(f"{values[f'onerec/{metric}']:.4f}" for metric in metrics)])
    print(table(lines, ["", *metrics]))
