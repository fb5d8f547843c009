"""How a row of the contest is trained within a budget, stopped on validation, and judged: the same for all of them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from benchmarks.harness import cpu_seconds, say
from benchmarks.quality.alignment import align
from benchmarks.quality.experiments import Row

Measured = dict[str, float]
KS = (5, 10)
METRICS = tuple(f"{metric}@{k}" for metric in ("recall", "ndcg") for k in KS)
# A sequence model's settings, as SequentialConfig and SequentialTrainingArguments name them.
SEQUENCE_SETTINGS = {
    "model": "architecture",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "dropout": "dropout_rate",
    "scaled": "scale_embeddings",
    "loss": "loss",
    "label_smoothing": "label_smoothing_factor",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "batch_size": "per_device_train_batch_size",
    "share": "target_share",
    "schedule": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "patience": "early_stopping_patience",
}
CHOSEN_BY = "ndcg@10"  # on validation users
# How a generator is asked: no weights depend on it.
ASKED = ("eval_num_beams", "max_history", "item_score_weight", "per_device_eval_batch_size")
DEPTH = 40  # items of a ranking that is kept
EPOCHS, PATIENCE = 300, 20  # of sequence models that say nothing else: at most, and without a gain


class Budget:
    """Time for training, less what judging takes: CPU time of all threads, or wall time where a GPU trains."""

    def __init__(self, minutes: float | None):
        import torch

        self._clock = time.perf_counter if torch.cuda.is_available() else cpu_seconds
        self._seconds, self._start, self._paused = minutes and 60 * minutes, self._clock(), 0.0
        self._wall = time.perf_counter()

    def spent(self) -> float:
        """The share that is used up; nothing of an unlimited one."""
        return (self._clock() - self._start) / self._seconds if self._seconds else 0.0

    def wall_seconds(self) -> float:
        return time.perf_counter() - self._wall - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before, wall = self._clock(), time.perf_counter()
        yield
        self._start += self._clock() - before
        self._paused += time.perf_counter() - wall


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
        return ranking_metrics(ranked, relevant, KS, len(self.data.item_ids))

    def judged(
        self, rank: Callable[[list[np.ndarray]], np.ndarray], splits: Sequence[str], keep: str | None = None
    ) -> Measured:
        """Metrics of what ranks items for histories, as `SPLIT/METRIC`; the rankings are kept in files whose names begin with `keep`."""
        found = {}
        for split in splits:
            examples = self.examples(split)
            ranked = rank(self.rows(examples, "history"))
            if keep is not None:
                np.savez_compressed(f"{keep}-{split}.npz", rows=ranked.astype(np.int32))
            metrics = self.metrics(ranked, examples)
            found |= {f"{split}/{name}": metrics[name] for name in METRICS}
        return found


def for_items(name: str, row: Row, items) -> Row:
    """
    The row, its semantic IDs and features made of the items' texts where their embeddings are not given.

    Raises:
        ValueError: there are no texts either.
    """
    made_of = {key: row.settings[key] for key in ("embedding", "features") if key in row.settings}
    if items is None:
        if any(kinds != "behaviour" for kinds in made_of.values()):
            raise ValueError(
                f"the row {name} takes items' texts, and the data set has none: IDs can do with --set embedding=behaviour"
            )
    elif items.embeddings is None:
        made_of = {key: kinds.replace("given", "text") for key, kinds in made_of.items()}
    return replace(row, settings={**row.settings, **made_of})


def run_row(
    contest: Contest,
    row: Row,
    config: list[str],
    minutes: float | None,
    splits: Sequence[str],
    keep: str | None = None,
) -> Measured:
    """
    One row for one seed: the metrics on these splits, as `SPLIT/METRIC`; `chosen`, what the validation users that are asked said of the weights
    that stayed (with `judged_users` 0 nobody is asked, the last weights stay, and there is no such number); `train_seconds`, wall time without
    judging; and parameters.

    Args:
        minutes: of [`Budget`] for training; as long as the row's settings say when None.
        keep: a generator is kept in this folder, the rankings of any trained model in files whose names begin so.
    """
    runs = {"ranking": _run_ranking, "sequence": _run_sequence, "onerec": _run_onerec}
    return runs[row.kind](contest, row, config, minutes, splits, keep)


def _run_ranking(contest: Contest, row: Row, config: list[str], minutes: float | None, splits: Sequence[str], keep):
    from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline

    baseline = PopularityBaseline() if row.settings["model"] == "popularity" else ItemKNNBaseline()
    baseline.fit(contest.data.train_rows(), len(contest.data.item_ids))
    return contest.judged(lambda histories: baseline.recommend(histories, 10, contest.exclude_seen), splits)


def _run_sequence(contest: Contest, row: Row, config: list[str], minutes: float | None, splits: Sequence[str], keep):
    import torch

    from benchmarks.quality.budget_trainer import BudgetSequentialTrainer
    from onerec_hf.baselines import SequentialRecommender
    from onerec_hf.trainers import SequentialTrainingArguments
    from onerec_hf.workflows.steps import embed_items

    data_args, id_args, *_ = parsed(config, {})
    settings = {"epochs": 10_000 if minutes else EPOCHS, "patience": PATIENCE, **row.settings}
    features, bf16 = None, {"float32": False, "bfloat16": True}[settings.pop("precision", "float32")]
    if "features" in settings:
        id_args.embedding, id_args.semantic_id_seed = settings.pop("features"), contest.seed
        features = embed_items(contest.data, id_args)[0]
    named = {SEQUENCE_SETTINGS[name]: value for name, value in settings.items()}
    of_training = {name for name in named if name in SequentialTrainingArguments.__dataclass_fields__}
    training = {name: named.pop(name) for name in of_training}
    torch.manual_seed(contest.seed)
    # As much history as the generators read.
    model = SequentialRecommender.from_items(
        contest.data.item_ids, features, **{"max_history": data_args.max_history, **named}
    )
    asked = contest.examples("validation", contest.asked) if contest.judged_users else None
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        args = SequentialTrainingArguments(
            scratch,
            save_strategy="best",
            save_only_model=True,
            eval_exclude_seen=contest.exclude_seen,
            seed=contest.seed,
            bf16=bf16,
            report_to="none",
            disable_tqdm=True,
            **training,
        )
        budget = Budget(minutes)
        sequences = contest.data.split.train_sequences
        trainer = BudgetSequentialTrainer(model, args, sequences, asked, budget=budget)
        trainer.train()
    more = {} if asked is None else {"chosen": trainer.state.best_metric}
    seconds = budget.wall_seconds()
    found = contest.judged(lambda histories: model.rank(histories, DEPTH, contest.exclude_seen), splits, keep)
    return {**found, **more, "train_seconds": seconds, "parameters": model.num_parameters()}


def _run_onerec(contest: Contest, row: Row, config: list[str], minutes: float | None, splits: Sequence[str], keep):
    from transformers import set_seed

    from benchmarks.quality.budget_trainer import BudgetTrainer
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.workflows.steps import fit_catalogue, new_model

    settings = dict(row.settings)
    weights = [float(weight) for weight in _listed(settings.pop("item_score_weights", ()))]
    alignment = settings.pop("alignment", None)
    averaged, least = settings.pop("averaged", None), float(settings.pop("least_learning_rate", 0))
    data_args, id_args, model_args, run_args, training_args = parsed(config, settings)
    data = with_windows(contest.data, data_args, run_args.train_on)
    set_seed(contest.seed)
    id_args.semantic_id_seed = training_args.seed = contest.seed
    fitted = fit_catalogue(data, id_args)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history)
    model = new_model(model_args, processor, data_args.session_length)
    say(f"{model.num_parameters():,} parameters, {len(data.split.train):,} examples")
    with _unsaved(training_args):
        if minutes:
            training_args.num_train_epochs, training_args.max_steps = 10_000, -1
        asked = contest.examples("validation", contest.asked) if contest.judged_users else None
        budget = Budget(minutes)
        trainer = BudgetTrainer(
            model,
            training_args,
            train_dataset=data.split.train,
            processing_class=processor,
            asked=asked,
            budget=budget,
            least_learning_rate=least,
            averaged=averaged and float(averaged),
        )
        trainer.train()
        seconds, state, more = budget.wall_seconds(), trainer.state, {}
        say(f"{state.global_step} steps, {state.epoch:.2f} epochs")
        if asked is not None:
            more["chosen"] = trainer.restore_best()
            if weights:
                more = dict(zip(("chosen", "item_score_weight"), trainer.best_item_score_weight(weights), strict=True))
        if alignment is not None:
            seconds += _aligned(model, processor, contest, data_args, alignment)
        if keep is not None:
            trainer.save_model(keep)
        found = _judged_generator(trainer, contest, splits, keep)
    return {**found, **more, "train_seconds": seconds, "parameters": model.num_parameters()}


@contextlib.contextmanager
def _unsaved(training_args) -> Iterator[None]:
    """A trainer of these arguments leaves no files behind, and what it prints stays out of the table."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        training_args.output_dir, training_args.save_strategy, training_args.disable_tqdm = scratch, "no", True
        yield


def _aligned(model, processor, contest: Contest, data_args, settings: dict[str, Any]) -> float:
    """Goes on training `model` ([`align`]); the seconds it took."""
    windows, began = with_windows(contest.data, data_args, "windows").split.train, time.perf_counter()
    align(model, processor, contest, windows, settings)
    return time.perf_counter() - began


def judge_kept(
    contest: Contest,
    folder: str,
    settings: dict[str, Any],
    config: list[str],
    splits: Sequence[str],
    keep: str | None = None,
    alignment: dict[str, Any] | None = None,
) -> Measured:
    """
    The metrics of a generator that a run kept, asked otherwise or aligned first (which takes `align_seconds`).

    Args:
        folder: what `run_row` was given as `keep`.
        settings: some of ASKED.
        keep: its rankings are kept in files whose names begin so, and in a folder of that name what alignment made of it.
        alignment: settings of [`align`].
    """
    from onerec_hf import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer

    data_args, _, model_args, _, training_args = parsed(config, settings)
    processor = OneRecProcessor.from_pretrained(folder, max_history=data_args.max_history)
    model = cast(Any, OneRecForConditionalGeneration.from_pretrained(folder))
    if "item_score_weight" in settings:
        model.config.item_score_weight = model_args.item_score_weight
    with _unsaved(training_args):
        more = {}
        if alignment is not None:
            data_args.session_length = model.config.session_length
            more["align_seconds"] = _aligned(model, processor, contest, data_args, alignment)
        trainer = OneRecTrainer(
            model, training_args, train_dataset=contest.data.split.train, processing_class=processor
        )
        if keep is not None and alignment is not None:
            trainer.save_model(keep)
        return {**_judged_generator(trainer, contest, splits, keep), **more}


def _judged_generator(trainer, contest: Contest, splits: Sequence[str], keep: str | None) -> Measured:
    found = {split: trainer.evaluate(contest.examples(split), metric_key_prefix="") for split in splits}
    if keep is not None:
        for split in splits:
            save_rankings(f"{keep}-{split}.npz", trainer, contest.examples(split))
    names = ("invalid_id_rate", *METRICS)
    return {f"{split}/{name}": values[f"_{name}"] for split, values in found.items() for name in names}


def save_rankings(path: str, trainer, examples, depth: int = DEPTH) -> None:
    """Rows of the `depth` items that are ranked best for each user, and their scores, best first."""
    rows, scores = [], []
    processor, model = trainer.processing_class, trainer.model
    trainer.args.train_sampling_strategy = "random"  # users in their order
    for batch in trainer.get_eval_dataloader(
        examples.select(range(len(examples)))
    ):  # another data set: another loader
        found = model.recommend(
            batch["input_ids"], batch["attention_mask"], session_length=1, num_beams=depth, num_return_sequences=depth,
            exclude=batch["exclude"], return_dict_in_generate=True,
        )  # fmt: skip
        rows.append(processor.item_rows(found.sequences).view(-1, depth).cpu().numpy().astype(np.int32))
        scores.append(found.sequences_scores.view(-1, depth).float().cpu().numpy().astype(np.float16))
    np.savez_compressed(path, rows=np.concatenate(rows), scores=np.concatenate(scores))


def fused(contest: Contest, files: Sequence[str], splits: Sequence[str], rescored: bool = False) -> Measured:
    """
    Metrics of several models' rankings as one: an item's score is the sum of 1 / (60 + rank) over the models that rank it (reciprocal rank
    fusion, Cormack et al., SIGIR 2009).

    Args:
        files: what `run_row` was given as `keep`.
        rescored: no items but those that the first of them ranks: its beams, put in another order by the others.
    """
    found = {}
    for split in splits:
        rankings = [np.load(f"{file}-{split}.npz")["rows"] for file in files]
        items, users = len(contest.data.item_ids), len(rankings[0])
        ranked = np.empty((users, max(KS)), dtype=np.int64)
        for user in range(users):
            scores = np.zeros(items + 1)  # the last one is of places without an item
            for rows in rankings:
                scores[rows[user]] += 1 / (60 + np.arange(1, rows.shape[1] + 1))
            if rescored:
                scores[np.setdiff1d(np.arange(items), rankings[0][user])] = 0
            ranked[user] = np.argsort(-scores[:items], kind="stable")[: max(KS)]
        metrics = contest.metrics(ranked, contest.examples(split))
        found |= {f"{split}/{name}": metrics[name] for name in METRICS}
    return found


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
