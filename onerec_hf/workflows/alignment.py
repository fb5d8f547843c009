"""Alignment of a saved generator with rewards: by pairs (DPO), or by policy optimisation; evaluated before and after, and saved."""

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
from onerec_hf.workflows.alignment_report import alignment_panels, watch
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
from onerec_hf.workflows.dataset import RecommendationDataset, check_catalogue, drawn_examples
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
    from onerec_hf.trainers import OneRecDPOConfig, OneRecGRPOConfig

REWARDED_USERS = 1000
METHODS = ("dpo", "ecpo", "gbpo", "grpo")


@dataclass
class AlignSettings(ModelOutputSettings):
    """The model to align and the source of preferences."""

    method: str = field(
        default="dpo",
        metadata={
            "help": "dpo (pairs of sessions), or policy optimisation by ecpo, gbpo or grpo.",
            "choices": list(METHODS),
        },
    )
    model: str | None = field(default=None, metadata={"help": "A trained OneRec to align: folder or Hub id."})
    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward models that score the generated sessions: folders or Hub ids."}
    )
    preferences: str | None = field(
        default=None,
        metadata={"help": ".jsonl or .parquet of history, chosen, rejected (lists of item ids) in place of a reward."},
    )
    impressions: str | None = field(
        default=None,
        metadata={
            "help": "In place of a reward, with ecpo, gbpo or grpo: your table of impressions; samples of another policy, rewarded by play time."
        },
    )
    play_time_column: str = field(
        default="play_time_ms", metadata={"help": "Column of --impressions: play time in milliseconds."}
    )
    duration_column: str = field(
        default="duration_ms", metadata={"help": "Column of --impressions: duration of the item in milliseconds."}
    )
    dislike_column: str | None = field(
        default=None, metadata={"help": "Column of --impressions: numbers above 0 for dislikes."}
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
            ValueError: no model, an unknown method, neither or both of rewards and preferences, or a held-out judge that is also a reward.
        """
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.model is None:
            raise ValueError("pass --model: the folder or Hub id of a trained OneRec")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"--max_examples must be at least 1; got {self.max_examples}")
        if (self.reward is not None) + (self.preferences is not None) + (self.impressions is not None) != 1:
            raise ValueError(
                "pass either --reward, models that score generated sessions, or --preferences, a file of pairs; with --method ecpo, gbpo or grpo "
                "--reward or --impressions"
            )
        if self.impressions is not None and self.method == "dpo":
            raise ValueError("--impressions are samples, which --method dpo does not read; pass --method gbpo")
        if self.preferences is not None and self.method != "dpo":
            raise ValueError(f"--preferences are pairs, which --method {self.method} does not read; pass --reward")
        both = {os.path.realpath(path) for path in self.reward or []} & {
            os.path.realpath(path) for path in self.judge or []
        }
        if both:
            raise ValueError(f"--judge {sorted(both)[0]} is also a --reward; pass a held-out reward model")


def align(
    data: RecommendationDataset | DataSettings | None = None, *settings: object, command: str | None = None, **options
) -> GeneratorResult:
    """
    Aligns a saved generator and saves the aligned model, `results.json` and card into `output_dir`: by DPO, with pairs of its sessions selected
    by reward models or with given pairs, which are saved too; or with another `method` by policy optimisation, where reward models score sessions
    that it draws at every step. `resume_from_checkpoint="last"` resumes a run that was killed.

    Args:
        data: a dataset, or the settings to load one after the options are checked. Without it, `options` name the data.
        settings: [`AlignSettings`], [`ShardingSettings`] and [`~onerec_hf.trainers.OneRecDPOConfig`] (with a `method` other than "dpo"
            [`~onerec_hf.trainers.OneRecGRPOConfig`]), each optional, in any order.
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
    from onerec_hf.trainers.sharding import unsharded_model

    where, options = data_and_options(data, options)
    chosen = next((each for each in settings if isinstance(each, AlignSettings)), AlignSettings())
    method = str(options.get("method", chosen.method))
    kinds = (AlignSettings, ShardingSettings, config_of(method))
    if method in METHODS[1:] and not any(isinstance(each, kinds[-1]) for each in settings):
        options.setdefault("loss_type", method)
    how, sharding, args = gather(kinds, settings, options)
    assert isinstance(how, AlignSettings)
    args = copy.copy(args)
    sharding.check(args)
    how.check()
    check_loss(how.method, args.loss_type)
    assert how.model is not None
    folder = Path(args.output_dir)
    with own_folder(folder):
        resumes = open_folder(folder, how.overwrite, args)
        (how, sharding, args), given, before = as_before(kinds, (how, sharding, args), settings, options)
        if how.method != method:
            raise ValueError(f"this run was started with --method {how.method}; pass it again to resume the run")
        assert how.model is not None
        if folder.resolve() == Path(how.model).resolve():
            raise ValueError(f"--output_dir {folder} is the model itself; name another folder")
        started = time.perf_counter()
        processor, model = load_processor("--model", how.model), load_model("--model", how.model)
        model.parallel_decoder = None  # trained on weights that change
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
        logged = None if how.impressions is None else _logged_samples(how, args, dataset, processor)
        rows_given = preferences if logged is None else logged
        examples = drawn_examples(dataset.train if rows_given is None else rows_given, how.max_examples, args.seed)
        real: Any = dataset.train
        trainer = make_trainer(
            sharding.shard(model), rewards, args, processor, examples, None if logged is None else real
        )
        trainer.add_callback(record.callback())
        guard = watch(trainer, judges, dataset, exclude_seen) if how.evaluate else None
        if rewards and how.method == "dpo":
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
            if guard is not None and args.guards:
                scored.append(result_row("kept_step", guard.verdict.best, "steps"))
            rows += [*after, *scored, result_row("seconds", time.perf_counter() - started, "s")]
            report(trainer, folder, dataset, rows, how, exclude_seen, command, record.changes)
            finish(folder)
            say(f"saved to {folder}")
        wait()
        return GeneratorResult(rows, folder, trainer)


def _logged_samples(how: AlignSettings, args: Any, dataset: RecommendationDataset, processor: OneRecProcessor) -> Any:
    """The samples of `--impressions`; histories are of the training interactions."""
    from onerec_hf.data import logged_samples

    assert how.impressions is not None
    rows, note = logged_samples(
        how.impressions,
        dataset.train_sequences,
        processor.catalogue,
        play_time_column=how.play_time_column,
        duration_column=how.duration_column,
        dislike_column=how.dislike_column,
        **{name: dataset.options[name] for name in ("user_column", "item_column", "timestamp_column")},
        max_history=dataset.max_history,
        exclude_seen=args.constrained and args.exclude_seen,
    )
    say(note)
    return rows


def config_of(method: str) -> type:
    """
    The training arguments of a method.

    Example:
        >>> config_of("ecpo").__name__
        'OneRecGRPOConfig'
    """
    from onerec_hf.trainers import OneRecDPOConfig, OneRecGRPOConfig

    return OneRecGRPOConfig if method in METHODS[1:] else OneRecDPOConfig


def check_loss(method: str, loss_type: Any) -> None:
    """
    Raises:
        ValueError: a loss of another method.

    Example:
        >>> check_loss("grpo", "dapo")
    """
    own = METHODS[1:3]
    if (method in own and loss_type != method) or (method == "grpo" and loss_type in own):
        raise ValueError(f"--loss_type {loss_type} does not belong to --method {method}; leave one of them out")


def make_trainer(
    model,
    rewards: list,
    args: OneRecDPOConfig | OneRecGRPOConfig,
    processor: OneRecProcessor,
    examples: datasets.Dataset,
    real_sessions: datasets.Dataset | None = None,
) -> Any:
    """
    The trainer that draws pairs, or sessions, with the rewards; without rewards the trainer for given pairs or samples.

    Args:
        real_sessions: examples for the next-token loss beside given samples.
    """
    from onerec_hf.trainers import OneRecDPOTrainer, OneRecGRPOConfig, OneRecGRPOTrainer, Seq2SeqDPOTrainer

    if isinstance(args, OneRecGRPOConfig):
        if rewards:
            say(f"{len(examples):,} histories, {args.num_generations} sessions for each")
        return OneRecGRPOTrainer(
            model,
            rewards,
            args=args,
            train_dataset=examples,
            processing_class=processor,
            ntp_dataset=drawn_examples(real_sessions, None, args.seed) if real_sessions is not None else None,
        )
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
    how: AlignSettings,
    exclude_seen: bool,
    command: str | None,
    resumed: list[dict[str, Any]],
) -> None:
    """
    Writes pairs, `results.json`, card and pictures into the folder of the aligned model.

    Args:
        how: the method and its source of preferences.
        exclude_seen: whether the rankings left out the items of a user's history.
        resumed: what calls that resumed the run changed.
    """
    from onerec_hf.hub_cards import Alignment, Training, write_generator_card

    if how.method != "dpo":
        alignment = Alignment.of_policy(trainer)
    elif how.reward:
        alignment = save_pairs(kept_pairs(trainer), folder, trainer, data, command)
    else:
        alignment = Alignment.of(trainer)
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


def session_reward(model, processor: OneRecProcessor, examples: list[dict[str, Any]], rewards: list) -> float:
    """Mean over users of the sum of the rewards of the session that the model recommends; ranks share the users. Reward models read positive histories."""
    ranks = all_ranks()
    mine = examples if ranks is None else examples[ranks.share(len(examples))]
    worth = _session_rewards(model, processor, mine, rewards)
    parts = [worth] if ranks is None else ranks.gather_objects(worth)
    return float(np.concatenate(parts).mean())


def _session_rewards(model, processor: OneRecProcessor, examples: list[dict[str, Any]], rewards: list) -> np.ndarray:
    """(users,) float64."""
    from onerec_hf.data.collators import positive_items
    from onerec_hf.trainers.watching import recommended_sessions

    sessions, seen = (
        recommended_sessions(model, processor, examples),
        [positive_items(example) for example in examples],
    )
    return np.sum([reward.reward(seen, sessions) for reward in rewards], axis=0) if examples else np.zeros(0)


def reward_rows(
    model, processor: OneRecProcessor, judges: dict[str, list], data: RecommendationDataset, when: str
) -> list[dict[str, Any]]:
    """Result rows `NAME/before` or `NAME/after`: the mean reward of sessions for test users, without those who have too few items left for one."""
    from onerec_hf.trainers.watching import with_items_left

    some = data.test.select(range(min(REWARDED_USERS, len(data.test)))).to_list()
    examples = with_items_left(some, processor, model.config.session_length)
    return [
        result_row(f"{name}/{when}", session_reward(model, processor, examples, rewards), "reward")
        for name, rewards in judges.items()
    ]
