"""Preference alignment of a saved generator: pairs drawn with reward models, or given ones; evaluated before and after, and saved."""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.workflows.alignment_report import alignment_panels, recommended_sessions, watch
from onerec_hf.workflows.artefact import (
    catalogue_of,
    find_origin,
    load_model,
    load_processor,
    load_reward,
    recorded_in,
    save_trained,
    write_items,
    write_origin,
)
from onerec_hf.workflows.data_options import excludes_seen, option_words, save_data_options
from onerec_hf.workflows.dataset import RecommendationDataset, check_catalogue, sample
from onerec_hf.workflows.distributed import all_ranks, is_first, say, wait
from onerec_hf.workflows.evaluation import ranking_rows
from onerec_hf.workflows.loading import as_dataset, data_and_options
from onerec_hf.workflows.preferences import keep_pairs, kept_pairs, read_preferences, save_pairs
from onerec_hf.workflows.results import GeneratorResult
from onerec_hf.workflows.resuming import as_before, of_data, record_of
from onerec_hf.workflows.run_folder import begin, finish, open_folder, own_folder, resumable
from onerec_hf.workflows.settings import DataSettings, ModelOutputSettings, gather
from onerec_hf.workflows.sharding import ShardingSettings
from onerec_hf.workflows.training_report import write_training_report

if TYPE_CHECKING:
    import datasets

    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecDPOConfig

REWARDED_USERS = 1000


@dataclass
class AlignSettings(ModelOutputSettings):
    """The model to align and the source of preferences."""

    model: str | None = field(default=None, metadata={"help": "A trained OneRec to align: folder or Hub id."})
    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward models that score the generated sessions: folders or Hub ids."}
    )
    preferences: str | None = field(
        default=None,
        metadata={"help": ".jsonl or .parquet of history, chosen, rejected (lists of item ids) in place of a reward."},
    )
    judge: list[str] | None = field(
        default=None,
        metadata={"help": "Held-out reward models, which only score generated sessions before and after."},
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Random sample of training examples to align on; all by default."}
    )
    evaluate: bool = field(
        default=True, metadata={"help": "Rank the test items before and after, also with popularity and item-kNN."}
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: no model, neither or both of rewards and preferences, or a held-out judge that is also a reward.
        """
        if self.model is None:
            raise ValueError("pass --model: the folder or Hub id of a trained OneRec")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"--max_examples must be at least 1; got {self.max_examples}")
        if (self.reward is None) == (self.preferences is None):
            raise ValueError(
                "pass either --reward, models that score generated sessions, or --preferences, a file of pairs"
            )
        both = {os.path.realpath(path) for path in self.reward or []} & {
            os.path.realpath(path) for path in self.judge or []
        }
        if both:
            raise ValueError(f"--judge {sorted(both)[0]} is also a --reward; pass a held-out reward model")


def align(
    data: RecommendationDataset | DataSettings | None = None, *settings: object, command: str | None = None, **options
) -> GeneratorResult:
    """
    Aligns a saved generator by DPO, with pairs of its sessions selected by reward models or with given pairs, and saves the aligned
    model, its pairs, `results.json` and card into `output_dir`. `resume_from_checkpoint="last"` resumes a run that was killed.

    Args:
        data: a dataset, or the settings to load one after the options are checked. Without it, `options` name the data.
        settings: [`AlignSettings`], [`ShardingSettings`] and [`~onerec_hf.trainers.OneRecDPOConfig`], each optional, in any order.
        command: the command line, for results and card.
        options: single fields of these settings, e.g. `model="runs/mine", reward=["runs/reward"]`, and of [`DataSettings`]; data options that
            are not given are those that the model was trained with. `output_dir` where no [`~onerec_hf.trainers.OneRecDPOConfig`] is given.

    Returns:
        The aligned model; `rows` hold `before/onerec/...`, `onerec/...`, the baselines and the rewards before and after.

    Raises:
        ValueError, FileExistsError, RunComplete, KeyboardInterrupt, TypeError: as for `train`.

    Example:
        >>> result = align(dataset, model="runs/mine", reward=["runs/reward"], output_dir="runs/aligned")  # doctest: +SKIP
        >>> result.metrics["reward/before"], result.metrics["reward/after"]  # doctest: +SKIP
    """
    from onerec_hf.trainers import OneRecDPOConfig
    from onerec_hf.trainers.sharding import unsharded_model

    where, options = data_and_options(data, options)
    kinds = (AlignSettings, ShardingSettings, OneRecDPOConfig)
    how, sharding, args = gather(kinds, settings, options)
    assert isinstance(how, AlignSettings)
    args = copy.copy(args)
    sharding.check(args)
    how.check()
    assert how.model is not None
    folder = Path(args.output_dir)
    with own_folder(folder):
        resumes = open_folder(folder, how.overwrite, args)
        (how, sharding, args), given, before = as_before(kinds, (how, sharding, args), settings, options)
        assert how.model is not None
        if folder.resolve() == Path(how.model).resolve():
            raise ValueError(f"--output_dir {folder} is the model itself; name another folder")
        started = time.perf_counter()
        processor, model = load_processor("--model", how.model), load_model("--model", how.model)
        preferences = None if how.preferences is None else read_preferences(how.preferences, processor)
        rewards = [load_reward(path) for path in how.reward or []]
        dataset = as_dataset(where, how.model)
        record = record_of(before, args.resume_from_checkpoint, given, of_data(dataset), kinds, args)
        exclude_seen = excludes_seen("--model", how.model)
        check_catalogue(f"--model {how.model}", catalogue_of(processor), dataset)
        # The reward that picks the pairs rises in any case; the held-out judges show whether sessions are better.
        judges = {"reward": rewards, "heldout_reward": [load_reward(path, "--judge") for path in how.judge or []]}
        judges = {name: models for name, models in judges.items() if models}
        before = ranking_rows(model, processor, dataset, args.use_cpu, exclude_seen) if how.evaluate else []
        scored = reward_rows(model, processor, judges, dataset, "before") if how.evaluate else []
        args.output_dir = str(folder / "checkpoints")
        examples = _drawn(dataset.train if preferences is None else preferences, how.max_examples, args.seed)
        trainer = make_trainer(sharding.shard(model), rewards, args, processor, examples)
        trainer.add_callback(record.callback())
        if how.evaluate:
            watch(trainer, judges, dataset, exclude_seen)
        if rewards:
            keep_pairs(trainer)
        origin = find_origin(how.model, how.save_items)
        begin(folder, command, resumes)
        write_origin(folder, origin)
        save_data_options(folder, dataset, exclude_seen)
        write_items(folder, dataset.items if how.save_items else None, processor)
        with resumable(folder, command), contextlib.redirect_stdout(sys.stderr):
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            save_trained(trainer, folder)
        after = []
        if how.evaluate:
            with unsharded_model(trainer.model) as aligned:
                after = ranking_rows(aligned, processor, dataset, args.use_cpu, exclude_seen)
                scored += reward_rows(aligned, processor, judges, dataset, "after")
        rows: list[dict[str, Any]] = []
        if is_first():
            rows += ({**row, "name": f"before/{row['name']}"} for row in before if row["name"].startswith("onerec/"))
            rows += [*after, *scored, result_row("seconds", time.perf_counter() - started, "s")]
            report(trainer, folder, dataset, rows, bool(rewards), exclude_seen, command, record.changes)
            finish(folder)
            say(f"saved to {folder}")
        wait()
        return GeneratorResult(rows, folder, trainer)


def _drawn(examples: Any, count: int | None, seed: int) -> datasets.Dataset:
    """`count` of the examples in their order, drawn at random; all for None. Shards are read as one data set: pairs refer to rows by number."""
    from datasets import Dataset

    from onerec_hf.data import ExampleStream

    if isinstance(examples, ExampleStream):
        files: Any = examples.files  # its annotation wants paths of one class
        examples = Dataset.from_parquet(files, columns=examples.column_names)
    return sample(examples, count, seed)


def make_trainer(
    model, rewards: list, args: OneRecDPOConfig, processor: OneRecProcessor, examples: datasets.Dataset
) -> Any:
    """The trainer that draws pairs with the rewards; without rewards the trainer for given pairs."""
    from onerec_hf.trainers import OneRecDPOTrainer, Seq2SeqDPOTrainer

    if not rewards:
        args.remove_unused_columns = True
        return Seq2SeqDPOTrainer(model, args=args, train_dataset=examples, processing_class=processor)
    say(f"{len(examples):,} examples, pairs for {args.dpo_ratio:.1%} of them in each iteration")
    return OneRecDPOTrainer(model, rewards, args=args, train_dataset=examples, processing_class=processor)


def report(
    trainer: Any,
    folder: Path,
    data: RecommendationDataset,
    rows: list[dict[str, Any]],
    drawn: bool,
    exclude_seen: bool,
    command: str | None,
    resumed: list[dict[str, Any]],
) -> None:
    """
    Writes pairs, `results.json`, card and pictures into the folder of the aligned model.

    Args:
        drawn: whether the trainer drew its pairs.
        exclude_seen: whether the rankings left out the items of a user's history.
        resumed: what calls that resumed the run changed.
    """
    from onerec_hf.hub_cards import Alignment, Training, write_generator_card

    alignment = save_pairs(kept_pairs(trainer), folder, trainer, data, command) if drawn else Alignment.of(trainer)
    write_results(
        folder / "results.json",
        rows,
        command=command,
        seed=trainer.args.seed,
        dataset=data.name,
        protocol=data.protocol,
        **({"resumed_with": resumed} if resumed else {}),
    )
    write_generator_card(
        folder,
        trainer.processing_class,
        trainer.model,
        data,
        data.protocol,
        rows,
        exclude_seen=exclude_seen,
        data_options=shlex.join(option_words({**data.options, "exclude_seen": exclude_seen})),
        counts=data.counts(),
        training=Training.of(trainer),
        alignment=alignment,
        command=command,
    )
    about = [f"Aligned on {data.name}.", data.protocol]
    write_training_report(folder, alignment_panels(trainer.state.log_history), about)
    recorded_in(folder, trainer.model, trainer.processing_class)


def session_reward(model, processor: OneRecProcessor, histories: list[list], rewards: list) -> float:
    """Mean over users of the sum of the rewards of the session that the model recommends; ranks share the users."""
    ranks = all_ranks()
    mine = histories if ranks is None else histories[ranks.share(len(histories))]
    worth = _session_rewards(model, processor, mine, rewards)
    parts = [worth] if ranks is None else ranks.gather_objects(worth)
    return float(np.concatenate(parts).mean())


def _session_rewards(model, processor: OneRecProcessor, histories: list[list], rewards: list) -> np.ndarray:
    """(users,) float64."""
    sessions = recommended_sessions(model, processor, histories)
    return np.sum([reward.reward(histories, sessions) for reward in rewards], axis=0) if histories else np.zeros(0)


def reward_rows(
    model, processor: OneRecProcessor, judges: dict[str, list], data: RecommendationDataset, when: str
) -> list[dict[str, Any]]:
    """Result rows `NAME/before` or `NAME/after`: the mean reward of sessions for test users, without those who have too few items left for one."""
    catalogue, length = catalogue_of(processor), model.config.session_length
    histories = [
        history
        for history in data.test[:REWARDED_USERS]["history"]
        if catalogue.num_left(catalogue.indices(history)) >= length
    ]
    return [
        result_row(f"{name}/{when}", session_reward(model, processor, histories, rewards), "reward")
        for name, rewards in judges.items()
    ]
