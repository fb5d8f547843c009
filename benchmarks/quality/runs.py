"""One experiment with one seed: trained, its checkpoint selected on validation, evaluated; the protocol is the same for all kinds."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers import TrainerCallback

from benchmarks.harness import say
from benchmarks.quality.alignment import align
from benchmarks.quality.experiment import Experiment

if TYPE_CHECKING:
    import datasets

Measured = dict[str, float]
METRICS = ("recall@10", "ndcg@10")
SELECTED_BY = "ndcg@10"
# What a trained generator can be evaluated with: no weight depends on it.
EVALUATION = ("eval_num_beams", "max_history", "item_score_weight", "per_device_eval_batch_size")
DEPTH = 40  # items of a ranking that is kept
# Ten evaluations on the way; the checkpoint with the best metric is loaded at the end.
SELECTION = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 1,
    "load_best_model_at_end": "true",
    "metric_for_best_model": SELECTED_BY,
    "greater_is_better": "true",
}
QUICK = {"hidden_size": 32, "decoder_layers": 1, "kmeans_iterations": 4, "max_steps": 10}
QUICK_SELECTION = {"eval_steps": 0.5, "save_steps": 0.5}


@dataclass
class Benchmark:
    """
    One seed's protocol.

    Args:
        data: the prepared data set.
        exclude_seen: the items of a history are not ranked.
        selection_users: validation users that select the checkpoint; 0 keeps the last weights.
        quick: small models, few steps.
    """

    data: Any
    exclude_seen: bool
    seed: int
    selection_users: int
    quick: bool = False

    @cached_property
    def selection(self):
        """Examples of the validation users that select the checkpoint, the same for all experiments of a seed; None without them."""
        if not self.selection_users:
            return None
        users = np.random.default_rng(self.seed).permutation(len(self.data.validation))[: self.selection_users]
        return self.data.validation.select(np.sort(users))

    def examples(self, split: str):
        return getattr(self.data, split)

    def sequences(self) -> list[Any]:
        """The users' training sequences of item ids."""
        sequences = [np.asarray(sequence) for sequence in self.data.train_sequences]
        return sequences[:300] if self.quick else sequences

    def rows(self, examples, column: str) -> list[np.ndarray]:
        """A column's items as item indices."""
        return [np.searchsorted(self.data.item_ids, items) for items in examples.with_format(None)[column]]

    def metrics(self, ranked: np.ndarray, examples) -> dict[str, float]:
        from onerec_hf.evaluation import ranking_metrics

        relevant = np.array(self.rows(examples, "session"))
        return ranking_metrics(ranked, relevant, (10,), len(self.data.item_ids))

    def evaluate(
        self, rank: Callable[[datasets.Dataset], np.ndarray], splits: Sequence[str], keep: str | None = None
    ) -> Measured:
        """Metrics of a function from examples to rankings; with `keep` the rankings are saved as `KEEP-SPLIT.npz`."""
        found = {}
        for split in splits:
            examples = self.examples(split)
            ranked = rank(examples)
            if keep is not None:
                np.savez_compressed(f"{keep}-{split}.npz", rows=ranked.astype(np.int32))
            metrics = self.metrics(ranked, examples)
            found |= {named(split, name): metrics[name] for name in METRICS}
        return found


def named(split: str, metric: str) -> str:
    """A metric's name in the results: `ndcg@10` on test users, `validation/ndcg@10` on validation users."""
    return metric if split == "test" else f"{split}/{metric}"


def with_text(experiment: Experiment, items) -> Experiment:
    """
    The experiment with embeddings of the items' texts where the data set gives no embeddings.

    Raises:
        ValueError: the items have no texts either.
    """
    inputs = {key: experiment.settings[key] for key in ("embedding", "features") if key in experiment.settings}
    if items is None:
        if any(kinds != "behaviour" for kinds in inputs.values()):
            raise ValueError(
                f"experiment {experiment.name} needs item texts, and the data set has none. "
                "Semantic IDs can do without: --set embedding=behaviour"
            )
    elif items.embeddings is None:
        inputs = {key: kinds.replace("given", "text") for key, kinds in inputs.items()}
    return replace(experiment, settings={**experiment.settings, **inputs})


def run_experiment(
    benchmark: Benchmark, experiment: Experiment, config: list[str], splits: Sequence[str], keep: str | None = None
) -> Measured:
    """
    One experiment with one seed.

    Args:
        config: options of `onerec-hf train` that name the recipe and the data.
        keep: a generator is saved into this folder, the rankings of any trained model into files whose names begin with it.

    Returns:
        The metrics of [`named`], `train_seconds` (wall time without evaluation) and `parameters`; with selection users `chosen`, the metric of the
        selected checkpoint on them.
    """
    kinds = {"ranking": _run_ranking, "sequential": _run_sequential, "onerec": _run_onerec}
    return kinds[experiment.kind](benchmark, experiment, config, splits, keep)


def _run_ranking(benchmark: Benchmark, experiment: Experiment, config: list[str], splits: Sequence[str], keep):
    from onerec_hf.baselines import ItemKNNBaseline, PopularityBaseline

    models = {"popularity": PopularityBaseline, "item_knn": ItemKNNBaseline}
    model = models[experiment.settings["model"]]()
    model.fit(benchmark.data.train_rows(), len(benchmark.data.item_ids))

    def rank(examples):
        return model.recommend(benchmark.rows(examples, "history"), 10, benchmark.exclude_seen)

    return benchmark.evaluate(rank, splits)


def _run_sequential(benchmark: Benchmark, experiment: Experiment, config: list[str], splits: Sequence[str], keep):
    from onerec_hf.trainers import fit_sequential
    from onerec_hf.workflows.semantic_ids import embed_items

    data, (data_args, id_args, *_) = benchmark.data, parsed(config, {})
    settings = {**experiment.settings, **({"num_train_epochs": 1} if benchmark.quick else {})}
    features, ended = None, _StateAtEnd()
    if "features" in settings:
        id_args.embedding, id_args.semantic_id_seed = settings.pop("features"), benchmark.seed
        features = embed_items(data, id_args)[0]
    with contextlib.redirect_stdout(sys.stderr):
        model = fit_sequential(
            benchmark.sequences(),
            benchmark.selection,
            item_ids=data.item_ids,
            features=features,
            max_history=data_args.max_history,  # the generators read as much history
            eval_exclude_seen=benchmark.exclude_seen,
            seed=benchmark.seed,
            callbacks=[ended],
            **settings,
        )
    found = benchmark.evaluate(
        lambda examples: model.rank_examples(examples, DEPTH, benchmark.exclude_seen), splits, keep
    )
    return {**found, **_training_metrics(ended.state), "parameters": model.num_parameters()}


class _StateAtEnd(TrainerCallback):
    """Holds the trainer's state at the end of training."""

    state: Any = None

    def on_train_end(self, args, state, control, **kwargs):
        self.state = state


def _training_metrics(state) -> Measured:
    """`train_seconds` without the evaluations, and `chosen` if a checkpoint was selected."""
    seconds = sum(entry.get("train_runtime", 0.0) - entry.get("eval_runtime", 0.0) for entry in state.log_history)
    return {"train_seconds": seconds, **({} if state.best_metric is None else {"chosen": state.best_metric})}


def _run_onerec(benchmark: Benchmark, experiment: Experiment, config: list[str], splits: Sequence[str], keep):
    from transformers import set_seed

    from onerec_hf import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer
    from onerec_hf.workflows.artefact import new_model
    from onerec_hf.workflows.semantic_ids import fit_catalogue

    settings = {**experiment.settings, **(SELECTION if benchmark.selection_users else {"save_strategy": "no"})}
    if benchmark.quick:
        settings |= {**QUICK, **(QUICK_SELECTION if benchmark.selection_users else {})}
    data_args, id_args, model_args, run_args, training_args = parsed(config, settings)
    data = with_windows(benchmark.data, data_args, run_args.train_on)
    set_seed(benchmark.seed)
    id_args.semantic_id_seed = training_args.seed = benchmark.seed
    fitted = fit_catalogue(data, id_args)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history)
    model = new_model(model_args, processor, data_args.session_length)
    say(f"{model.num_parameters():,} parameters, {len(data.train):,} examples")
    with _scratch(training_args):
        trainer = OneRecTrainer(
            model,
            training_args,
            train_dataset=data.train,
            eval_dataset=benchmark.selection,
            processing_class=processor,
        )
        trainer.train()
        say(f"{trainer.state.global_step} steps, {trainer.state.epoch:.2f} epochs")
        measured = _training_metrics(trainer.state)
        if experiment.alignment is not None:
            measured["train_seconds"] += _aligned(model, processor, benchmark, data_args, experiment.alignment)
        if keep is not None:
            trainer.save_model(keep)
        found = _evaluate_generator(trainer, benchmark, splits, keep)
    return {**found, **measured, "parameters": model.num_parameters()}


@contextlib.contextmanager
def _scratch(training_args) -> Iterator[None]:
    """A trainer with these arguments leaves no files, and its prints stay out of the table."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        training_args.output_dir, training_args.disable_tqdm = scratch, True
        yield


def _aligned(model, processor, benchmark: Benchmark, data_args, settings: dict[str, Any]) -> float:
    """Trains `model` on by preference alignment; the seconds that took."""
    windows, began = with_windows(benchmark.data, data_args, "windows").train, time.perf_counter()
    align(model, processor, benchmark, windows, settings)
    return time.perf_counter() - began


def evaluate_folder(
    benchmark: Benchmark,
    folder: str,
    settings: dict[str, Any],
    config: list[str],
    splits: Sequence[str],
    keep: str | None = None,
    alignment: dict[str, Any] | None = None,
) -> Measured:
    """
    The metrics of a saved generator, with other evaluation settings or after alignment (then with `align_seconds`).

    Args:
        folder: the `keep` of [`run_experiment`].
        settings: some of EVALUATION.
        keep: its rankings are saved into files whose names begin with it, and the aligned generator into a folder of that name.
        alignment: settings of [`align`].
    """
    from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer

    data_args, _, model_args, _, training_args = parsed(config, {**settings, "save_strategy": "no"})
    processor = OneRecProcessor.from_pretrained(folder, max_history=data_args.max_history)
    model = cast(Any, OneRecForConditionalGeneration.from_pretrained(folder))
    if "item_score_weight" in settings:
        model.generation_config.item_score_weight = model_args.item_score_weight
    with _scratch(training_args):
        more = {}
        if alignment is not None:
            data_args.session_length = model.config.session_length
            more["align_seconds"] = _aligned(model, processor, benchmark, data_args, alignment)
        trainer = OneRecTrainer(model, training_args, train_dataset=benchmark.data.train, processing_class=processor)
        if keep is not None and alignment is not None:
            trainer.save_model(keep)
        return {**_evaluate_generator(trainer, benchmark, splits, keep), **more}


def _evaluate_generator(trainer, benchmark: Benchmark, splits: Sequence[str], keep: str | None) -> Measured:
    found = {split: trainer.evaluate(benchmark.examples(split), metric_key_prefix="") for split in splits}
    if keep is not None:
        for split in splits:
            save_rankings(f"{keep}-{split}.npz", trainer, benchmark.examples(split))
    metrics = ("invalid_id_rate", *METRICS)
    return {named(split, metric): values[f"_{metric}"] for split, values in found.items() for metric in metrics}


def save_rankings(path: str, trainer, examples, depth: int = DEPTH) -> None:
    """Saves each user's `depth` best item indices and their scores, best first."""
    rows, scores = [], []
    processor, model = trainer.processing_class, trainer.model
    trainer.args.train_sampling_strategy = "random"  # users in their order
    for batch in trainer.get_eval_dataloader(
        examples.select(range(len(examples)))
    ):  # another data set: another loader
        found = model.recommend(
            batch["input_ids"], batch["attention_mask"], session_length=1, num_beams=depth, num_return_sequences=depth,
            exclude=batch["exclude"], request_times=batch.get("request_times"), return_dict_in_generate=True,
        )  # fmt: skip
        rows.append(processor.item_indices(found.sequences).view(-1, depth).cpu().numpy().astype(np.int32))
        scores.append(found.sequences_scores.view(-1, depth).float().cpu().numpy().astype(np.float16))
    np.savez_compressed(path, rows=np.concatenate(rows), scores=np.concatenate(scores))


def ensemble(benchmark: Benchmark, files: Sequence[str], splits: Sequence[str]) -> Measured:
    """
    Metrics of an ensemble by reciprocal rank fusion (Cormack et al., SIGIR 2009): an item's score is the sum of 1 / (60 + rank) over the models
    that rank it.

    Args:
        files: the `keep` of [`run_experiment`], one for each model.
    """
    found = {}
    for split in splits:
        rankings = [np.load(f"{file}-{split}.npz")["rows"] for file in files]
        items, users = len(benchmark.data.item_ids), len(rankings[0])
        ranked = np.empty((users, 10), dtype=np.int64)
        for user in range(users):
            scores = np.zeros(items + 1)  # the last one belongs to beams without an item
            for rows in rankings:
                scores[rows[user]] += 1 / (60 + np.arange(1, rows.shape[1] + 1))
            ranked[user] = np.argsort(-scores[:items], kind="stable")[:10]
        metrics = benchmark.metrics(ranked, benchmark.examples(split))
        found |= {named(split, name): metrics[name] for name in METRICS}
    return found


def parsed(config: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
    """The settings of `onerec-hf train` (data, semantic IDs, model, training) from a configuration, with settings over it."""
    from onerec_hf.cli.arguments import parse
    from onerec_hf.trainers import OneRecTrainingArguments
    from onerec_hf.workflows import DataSettings, ModelSettings, SemanticIDSettings, TrainSettings

    kinds = (DataSettings, SemanticIDSettings, ModelSettings, TrainSettings, OneRecTrainingArguments)
    over = [str(part) for name, value in settings.items() for part in (f"--{name}", *_listed(value))]
    return parse(kinds, [*config, *over], "train")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def with_windows(data, settings, train_on: str):
    """The data set with training examples of these lengths; validation and test users stay those of the benchmark."""
    data = data.cut(session_length=settings.session_length, max_history=settings.max_history, stride=settings.stride)
    return data.on_prefixes() if train_on == "prefixes" else data
