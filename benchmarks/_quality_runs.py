"""How a row of the contest is trained within a budget, stopped on validation, and judged: the same for all of them."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from _harness import cpu_seconds, say
from _quality_rows import Row

CHOSEN_BY = "ndcg@10"  # on validation users
TENTHS = 10  # how often a generator is judged while it trains; sequence models are after each epoch


class Budget:
    """CPU time of this process, all threads, less what judging took."""

    def __init__(self, minutes: float):
        self._seconds, self._start = 60 * minutes, cpu_seconds()

    def spent(self) -> float:
        """The share that is used up."""
        return (cpu_seconds() - self._start) / self._seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = cpu_seconds()
        yield
        self._start += cpu_seconds() - before


@dataclass
class Contest:
    """One seed's data: the split, and who is asked while training."""

    data: Any
    exclude_seen: bool
    seed: int
    judged_users: int

    @cached_property
    def asked(self) -> np.ndarray:
        """Places of the validation users that decide when a training stops: the same for all rows of a seed."""
        users = len(self.data.split.validation)
        return np.sort(np.random.default_rng(self.seed).permutation(users)[: self.judged_users])

    def examples(self, split: str, only: np.ndarray | None = None):
        examples = getattr(self.data.split, split)
        return examples if only is None else examples.select(only)

    def rows(self, examples, column: str) -> list[np.ndarray]:
        """A column's items as positions in `data.item_ids`."""
        return [np.searchsorted(self.data.item_ids, items) for items in examples.with_format(None)[column]]

    def metrics(self, ranked: np.ndarray, examples) -> dict[str, float]:
        from onerec_hf.evaluation import ranking_metrics

        relevant = np.array(self.rows(examples, "session"))
        return ranking_metrics(ranked, relevant, (5, 10), len(self.data.item_ids))


def run_row(contest: Contest, row: Row, config: list[str], minutes: float, split: str) -> dict[str, float]:
    """Metrics of one row for one seed on a split; `chosen` is what the validation users said of the weights that stayed."""
    runs = {"ranking": _run_ranking, "sequence": _run_sequence, "onerec": _run_onerec}
    return runs[row.kind](contest, row, config, minutes, split)


def _run_ranking(contest: Contest, row: Row, config: list[str], minutes: float, split: str) -> dict[str, float]:
    from onerec_hf.evaluation import ItemKNNBaseline, PopularityBaseline

    examples = contest.examples(split)
    baseline = PopularityBaseline() if row.settings["model"] == "popularity" else ItemKNNBaseline()
    baseline.fit(contest.data.train_rows(), len(contest.data.item_ids))
    ranked = baseline.recommend(contest.rows(examples, "history"), 10, contest.exclude_seen)
    return contest.metrics(ranked, examples)


def _run_sequence(contest: Contest, row: Row, config: list[str], minutes: float, split: str) -> dict[str, float]:
    import torch
    from _sequence_models import SEQUENCE_MODELS
    from _sequence_training import train_sequence_model

    settings = dict(row.settings)
    training = {
        name: settings.pop(name) for name in ("loss", "lr", "batch_size", "share", "patience") if name in settings
    }
    torch.manual_seed(contest.seed)
    model = SEQUENCE_MODELS[settings.pop("model")](len(contest.data.item_ids), **settings)
    asked = contest.examples("validation", contest.asked)
    histories, budget = contest.rows(asked, "history"), Budget(minutes)

    def judge(model) -> float:
        with budget.paused():
            return contest.metrics(model.rank(histories, 10, contest.exclude_seen), asked)[CHOSEN_BY]

    rows = [sequence for sequence in contest.data.train_rows() if len(sequence) > 1]
    chosen = train_sequence_model(model, rows, contest.seed, 10_000, judge=judge, spent=budget.spent, **training)
    examples = contest.examples(split)
    ranked = model.rank(contest.rows(examples, "history"), 10, contest.exclude_seen)
    return {**contest.metrics(ranked, examples), "chosen": cast(float, chosen), "budget": budget.spent()}


def _run_onerec(contest: Contest, row: Row, config: list[str], minutes: float, split: str) -> dict[str, float]:
    from transformers import set_seed

    from onerec_hf.cli.steps import fit_catalogue, new_model
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    data_args, id_args, model_args, run_args, training_args = parsed(config, row.settings)
    data = with_windows(contest.data, data_args, run_args.train_on)
    set_seed(contest.seed)
    id_args.semantic_id_seed = training_args.seed = contest.seed
    fitted = fit_catalogue(data, id_args)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history)
    model = new_model(model_args, processor, data_args.session_length)
    say(f"{model.num_parameters():,} parameters, {len(data.split.train):,} examples, {minutes:g} CPU minutes")
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        training_args.output_dir, training_args.save_strategy, training_args.disable_tqdm = scratch, "no", True
        training_args.num_train_epochs, training_args.max_steps = 10_000, -1
        asked = contest.examples("validation", contest.asked)
        trainer = budget_trainer()(
            model, training_args, train_dataset=data.split.train, processing_class=processor, asked=asked,
            budget=Budget(minutes),
        )  # fmt: skip
        trainer.train()
        chosen = trainer.restore_best()
        say(
            f"{trainer.state.global_step} steps, {trainer.state.epoch:.2f} epochs; {CHOSEN_BY} {chosen:.4f} on validation"
        )
        found = trainer.evaluate(contest.examples(split), metric_key_prefix="")
    names = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in (5, 10)]
    return {**{name: found[f"_{name}"] for name in names}, "illegal_share": found["_illegal_share"], "chosen": chosen}


def parsed(config: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
    """`onerec-hf train`'s arguments of a configuration, with settings over it."""
    from onerec_hf.cli.arguments import DataArguments, ModelArguments, SemanticIDArguments, parse
    from onerec_hf.cli.train import TrainArguments
    from onerec_hf.trainers import OneRecTrainingArguments

    kinds = (DataArguments, SemanticIDArguments, ModelArguments, TrainArguments, OneRecTrainingArguments)
    over = [str(part) for name, value in settings.items() for part in (f"--{name}", *_listed(value))]
    return parse(kinds, [*config, *over], "train")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def with_windows(data, args, train_on: str):
    """The data with training examples of these lengths; validation and test stay the contest's."""
    from onerec_hf.cli.train import on_prefixes
    from onerec_hf.data import leave_one_out

    split = leave_one_out(
        data.sequences, session_length=args.session_length, max_history=args.max_history, stride=args.stride
    )
    data = replace(data, split=replace(data.split, train=split.train))
    return on_prefixes(data, args) if train_on == "prefixes" else data


def budget_trainer():
    """The trainer whose learning rate and end follow the CPU time that was spent, and which keeps its best weights."""
    import torch
    from transformers import TrainerCallback

    from onerec_hf.trainers import OneRecTrainer

    class FollowBudget(TrainerCallback):
        def __init__(self, trainer):
            self.trainer, self.tenth = trainer, 1

        def on_step_end(self, args, state, control, **kwargs):
            spent = self.trainer.budget.spent()
            if spent >= self.tenth / TENTHS:
                self.tenth = int(spent * TENTHS) + 1
                self.trainer.keep_best()
            control.should_training_stop |= spent >= 1

    class BudgetTrainer(OneRecTrainer):
        """Warm-up by steps, then a cosine down to zero over the budget."""

        model: Any

        def __init__(self, *args, budget: Budget, asked, **kwargs):
            self.budget, self.asked, self.best = budget, asked, (-1.0, {})
            super().__init__(*args, **kwargs)
            self.add_callback(FollowBudget(self))

        def keep_best(self) -> None:
            with self.budget.paused():
                value = self.evaluate(self.asked, metric_key_prefix="asked")[f"asked_{CHOSEN_BY}"]
                self.model.train()
            if value > self.best[0]:
                self.best = value, copy.deepcopy(self.model.state_dict())

        def restore_best(self) -> float:
            self.model.load_state_dict(self.best[1])
            return self.best[0]

        def create_scheduler(self, num_training_steps, optimizer=None):
            warmup = max(1, int(self.args.warmup_steps))

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.budget.spent())))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or cast(Any, self.optimizer), factor)
            return self.lr_scheduler

    return BudgetTrainer
