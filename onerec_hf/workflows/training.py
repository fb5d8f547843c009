"""From a dataset to a trained, evaluated and saved generator: semantic IDs, training, ranking with baselines, results and card."""

from __future__ import annotations

import contextlib
import copy
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.workflows.allocator import keep_freed_memory
from onerec_hf.workflows.artefact import (
    catalogue_of,
    check_finite,
    find_origin,
    load_model,
    load_processor,
    new_model,
    recorded_in,
    save_processor,
    save_trained,
    set_ranking_weights,
    write_origin,
)
from onerec_hf.workflows.auto import Choice, choices_table, shown
from onerec_hf.workflows.conclusion import conclude
from onerec_hf.workflows.data_options import excludes_seen, option_words, save_data_options
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, check_catalogue
from onerec_hf.workflows.distributed import is_first, num_ranks, say, wait
from onerec_hf.workflows.evaluation import rank_beside_baselines
from onerec_hf.workflows.evidence import about_lately, content_of_catalogue, fit_evidence
from onerec_hf.workflows.features import Worth, feature_worth, lifelong_history, set_features, worth_k
from onerec_hf.workflows.id_map import write_id_map
from onerec_hf.workflows.increment import newer, write_trained_on
from onerec_hf.workflows.loading import as_dataset, data_and_options
from onerec_hf.workflows.new_items import check_choice, settled
from onerec_hf.workflows.pace import Pace
from onerec_hf.workflows.presets import CUT, check_preset, choices_of, cut_as_chosen, data_given
from onerec_hf.workflows.refit import Refit, growth, refit
from onerec_hf.workflows.results import GeneratorResult
from onerec_hf.workflows.resuming import RunRecord, of_data, record_of
from onerec_hf.workflows.run_folder import (
    LOCK,
    UNFINISHED_RUN,
    begin,
    finish,
    open_folder,
    own_folder,
    resumable,
    resumes_in,
)
from onerec_hf.workflows.semantic_ids import fit_catalogue
from onerec_hf.workflows.settings import (
    DataSettings,
    ModelOutputSettings,
    ModelSettings,
    SemanticIDSettings,
    gather,
    given_options,
)
from onerec_hf.workflows.sharding import ShardingSettings
from onerec_hf.workflows.training_report import REPORT_HTML, report_panels, write_training_report
from onerec_hf.workflows.unread import unread, without_features
from onerec_hf.workflows.verdict import Verdict

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.semantic_ids import SemanticIDs
    from onerec_hf.semantic_ids.item_encoder import ItemEncoder
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
    from onerec_hf.workflows.pictures import Panel

OUTPUT_DIR = "onerec-model"
BOTH = "pass --model, which has its semantic IDs, or --semantic_ids for a new model; not both"
NOT_UPLOADED = ["checkpoints/**", ".unfinished/**", UNFINISHED_RUN, LOCK, "*.tmp"]


@dataclass
class TrainSettings(ModelOutputSettings):
    """Preset, training examples, early stopping, evaluation and checkpoints."""

    preset: str = field(
        default="auto",
        metadata={
            "help": "Options that you do not pass: auto (chosen from the data), paper (the paper's, the defaults listed here), tiger (TIGER's) or small (a first model without an item head)."
        },
    )
    train_on: str = field(
        default="windows",
        metadata={
            "help": "windows (one history per session) or prefixes (one history for all its sessions; with --encoder_is_causal)."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric_for_best_model; off by default."},
    )
    decay_on_plateau: int | None = field(
        default=None,
        metadata={
            "help": "With a constant learning rate: after this many evaluations without a better metric_for_best_model (at the latest after three quarters of the steps) it decays to 0 over a quarter of all steps, and the training ends. Off by default."
        },
    )
    validation_users: int = field(
        default=5000,
        metadata={"help": "Validation users of evaluations during training: a random sample, always the same users."},
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Time of the whole run, such as 10m (wall time) or 10m-cpu: the training and its schedule end in time for the evaluation."
        },
    )
    refit: bool = field(
        default=False,
        metadata={
            "help": "After the evaluation train once more on all interactions, nothing held out; that model is saved."
        },
    )
    new_items: str | None = field(
        default=None,
        metadata={
            "help": "With --model, items that it does not hold: add, skip (leave out their rows) or error. By default those that came after its training are left out, others are an error."
        },
    )
    baselines: bool = field(
        default=True,
        metadata={"help": "Also rank with popularity and item-kNN, which need all training sequences in memory."},
    )
    verdict_sasrec: bool = field(
        default=True,
        metadata={
            "help": "With --baselines: also train a small SASRec, for at most a quarter of the run's time (at least 5 seconds)."
        },
    )
    feature_worth: bool = field(
        default=True,
        metadata={
            "help": "With features: after the evaluation also measure what each is worth to the model, within at most a tenth of a --budget."
        },
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Keep output_dir/checkpoints (weights, optimizer, pickles) after the run; they are for resuming."
        },
    )


def train(
    data: RecommendationDataset | DataSettings | None = None,
    *settings: object,
    command: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options,
) -> GeneratorResult:
    """
    Trains a generator and saves it. Options that are not given are chosen from the data (`preset="auto"`) and printed with their reasons. It fits semantic IDs (or takes those of a folder, or continues from a saved model), trains, ranks the test
    items with model and baselines, and writes model, processor, catalogue, `results.json` and card into `output_dir`. With
    `resume_from_checkpoint="last"` the same call resumes a run that was killed. Under torchrun every rank makes the call.

    Args:
        data: a dataset, or the settings to load one after the options are checked. Without it, `options` name the data.
        settings: [`SemanticIDSettings`], [`ModelSettings`], [`ShardingSettings`], [`TrainSettings`] and
            [`~onerec_hf.trainers.OneRecTrainingArguments`], each optional, in any order. A settings object is given as a whole: nothing in it is
            chosen from the data.
        command: the command line, for results and card.
        callbacks: more callbacks of the trainer.
        options: single fields of these settings, e.g. `hidden_size=64, num_train_epochs=3`, and of [`DataSettings`], e.g.
            `interactions="ratings.csv"`. `output_dir` is `onerec-model` by default. With `model`, data options and `eval_exclude_seen` that are not
            given are those that it was trained with.

    Raises:
        ValueError: options that do not fit together or to the data, or a damaged artefact to start from. `output_dir` is untouched then.
        FileExistsError: `output_dir` is not empty and `overwrite` is not set.
        RunComplete: the run to resume is complete.
        KeyboardInterrupt: Ctrl-C, with the way to resume.
        TypeError: an unknown option.

    Example:
        >>> result = train(interactions="ratings.csv", items="films.csv", output_dir="runs/mine")  # doctest: +SKIP
        >>> result.metrics["onerec/recall@10"], result.model, result.processor  # doctest: +SKIP
    """
    first, source, options = given_settings(data, settings, options)
    folder, run = Path(str(first.args.output_dir)), first.run
    with own_folder(folder):
        own_checkpoint = open_folder(folder, run.overwrite, first.args)
        given, before = given_options(_kinds(), settings, options), RunRecord.of_checkpoint(first.args)
        if before is not None:
            options = before.completed(_kinds(), given, options)
            checkpoint, first = first.args.resume_from_checkpoint, Settings(*gather(_kinds(), settings, options))
            first = first._replace(args=copy.copy(first.args))
            first.args.resume_from_checkpoint, run = checkpoint, first.run
        pace = Pace.start(run.budget, run.validation_users, run.baselines, quiet=bool(first.args.disable_tqdm))
        pace.sasrec = run.baselines and run.verdict_sasrec
        with pace.progress or contextlib.nullcontext():
            return _train(
                source, folder, own_checkpoint, first, settings, options, given, before, pace, command, callbacks
            )


def _train(
    source: RecommendationDataset | DataSettings | Mapping[str, Any],
    folder: Path,
    own_checkpoint: bool,
    first: Settings,
    settings: tuple[object, ...],
    options: dict[str, Any],
    given: Mapping[str, Any],
    before: RunRecord | None,
    pace: Pace,
    command: str | None,
    callbacks: Sequence[TrainerCallback],
) -> GeneratorResult:
    """`train` once the options are checked and the folder is free."""
    started = time.perf_counter()
    option, place = _trained_before(first)
    if place is not None and "eval_exclude_seen" not in given_options(_kinds(), settings, options):
        options = {**options, "eval_exclude_seen": excludes_seen(option, place)}
    dataset, choices, final = final_settings(
        as_dataset(source, place, option), first, settings, options, own_checkpoint, before
    )
    chosen = {row.option: row.value for row in choices}
    left = "" if place is not None else unread(dataset)
    choices = [*without_features(left), *choices]
    record = record_of(
        before, first.args.resume_from_checkpoint, given, of_data(dataset), _kinds(), final.args, chosen
    )
    if choices:
        say(choices_table(choices))
    final.args.resume_from_checkpoint = first.args.resume_from_checkpoint
    if final.model.model is None:
        return _train_on(
            dataset, folder, final, choices, record, place, started, source, pace, command, callbacks, left
        )
    with settled(dataset, final.model.model, final.run.new_items, for_training=True) as (dataset, model):
        if isinstance(dataset, InMemoryDataset):
            dataset = newer(dataset, model, final.model.model)
        final = final._replace(model=replace(final.model, model=model))
        return _train_on(dataset, folder, final, choices, record, place, started, source, pace, command, callbacks)


def _train_on(
    dataset: RecommendationDataset,
    folder: Path,
    final: Settings,
    choices: list[Choice],
    record: RunRecord,
    place: str | None,
    started: float,
    source: RecommendationDataset | DataSettings | Mapping[str, Any],
    pace: Pace,
    command: str | None,
    callbacks: Sequence[TrainerCallback],
    left: str = "",
) -> GeneratorResult:
    """`train` once its data and the model to start from are final."""
    if final.run.train_on == "prefixes":
        if not isinstance(dataset, InMemoryDataset):
            raise ValueError(
                "--train_on goes with --interactions; what a prepared folder holds was chosen by `onerec-hf prepare --train_on`"
            )
        dataset = dataset.on_prefixes()
    if final.run.refit:
        pace.refit = growth(dataset)
    if final.run.feature_worth and dataset.features is not None and num_ranks() == 1:
        pace.features = len(dataset.features.schema.all)
    refitted = None
    trainer = train_generator(
        dataset,
        folder,
        final.ids,
        final.model,
        final.args,
        final.sharding,
        command,
        save_items=final.run.save_items,
        pace=pace,
        callbacks=[record.callback(), *stopping(final.run), *callbacks],
    )
    with resumable(folder, command):
        ranking = rank_beside_baselines(trainer, dataset, "test", final.run.baselines)
        verdict = conclude(
            trainer,
            dataset,
            ranking,
            folder,
            sasrec=pace.of_sasrec(time.perf_counter() - started),
            command=command,
            given=source if isinstance(source, Mapping) else None,
            fixed_sizes=place is not None,
            unread=left,
        )
        worth = feature_worth(trainer, dataset, final.args.seed, pace.worth_users())
        panels = report_panels(trainer, ranking)  # of the evaluated model, and before the counts of a refit
        if final.run.refit:
            trainer, refitted = refit(trainer, dataset, folder, final.args, _again(final, folder, pace))
    rows = ranking.rows
    if is_first():
        metric = f"ndcg@{worth_k(final.args.eval_top_k)}"
        rows.extend(each.row(metric) for each in worth)
        rows.append(result_row("seconds", time.perf_counter() - started, "s"))
        write_trained_on(folder, dataset, final.run.refit)
        report(trainer, folder, dataset, rows, command, choices, refitted, verdict, panels, record.changes, worth)
        finish(folder, final.run.keep_checkpoints)
    wait()
    return GeneratorResult(rows, folder, trainer, verdict)


def _trained_before(settings: Settings) -> tuple[str, str | None]:
    """The model that is trained further: the option that names it, and its folder or Hub id; None for a new one."""
    if (checkpoint := settings.args.resume_from_checkpoint) is not None:
        return "--resume_from_checkpoint", str(Path(checkpoint).resolve().parents[1])
    return "--model", settings.model.model


def _again(final: Settings, folder: Path, pace: Pace) -> Callable[..., OneRecTrainer]:
    """The training of `refit`: from the same model, or a new one with the semantic IDs of the folder."""
    from onerec_hf.trainers.callbacks import LastStepCallback

    # A lifelong pathway compresses by the same embeddings again.
    ids = replace(final.ids, semantic_ids=None if final.model.model is not None else str(folder))

    def train_again(
        data: RecommendationDataset,
        into: Path,
        args: OneRecTrainingArguments,
        last_step: int,
        evaluated: OneRecTrainer,
    ) -> OneRecTrainer:
        return train_generator(
            data,
            into,
            ids,
            final.model,
            args,
            final.sharding,
            can_resume=False,
            save_items=False,
            pace=Pace(progress=pace.progress),
            callbacks=[LastStepCallback(last_step)],
            weights_of=cast("OneRecForConditionalGeneration", evaluated.model),
        )

    return train_again


def chosen_settings(
    data: RecommendationDataset | DataSettings | None = None, *settings: object, **options
) -> list[Choice]:
    """
    The options that [`train`] would choose for the same call, with their reasons; nothing is trained or written.

    Raises:
        ValueError, TypeError: as [`train`].

    Example:
        >>> for option, value, reason in chosen_settings(interactions="ratings.csv"):  # doctest: +SKIP
        ...     print(option, value, reason)
    """
    first, source, options = given_settings(data, settings, options)
    _, place = _trained_before(first)
    dataset, choices, _ = final_settings(as_dataset(source, first.model.model), first, settings, options)
    return [*without_features("" if place is not None else unread(dataset)), *choices]


class Settings(NamedTuple):
    """The settings of a training."""

    ids: SemanticIDSettings
    model: ModelSettings
    sharding: ShardingSettings
    run: TrainSettings
    args: OneRecTrainingArguments


def _kinds() -> tuple[type, ...]:
    from onerec_hf.trainers import OneRecTrainingArguments

    return SemanticIDSettings, ModelSettings, ShardingSettings, TrainSettings, OneRecTrainingArguments


def given_settings(
    data: RecommendationDataset | DataSettings | None, settings: tuple[object, ...], options: dict[str, Any]
) -> tuple[Settings, RecommendationDataset | DataSettings | Mapping[str, Any], dict[str, Any]]:
    """What the caller gave, over the library's defaults and checked as far as it goes without the data; the data; and the other options."""
    source, options = data_and_options(data, options)
    if not any(type(each) is _kinds()[-1] for each in settings):
        options.setdefault("output_dir", OUTPUT_DIR)
    first = Settings(*gather(_kinds(), settings, options))
    first = first._replace(args=copy.copy(first.args))
    check_preset(first.run.preset)
    if first.run.preset == "paper":
        _check(first)
    elif first.model.model is not None and first.ids.semantic_ids is not None:
        raise ValueError(BOTH)
    return first, source, options


def final_settings(
    data: RecommendationDataset,
    first: Settings,
    settings: tuple[object, ...],
    options: dict[str, Any],
    own_checkpoint: bool = False,
    before: RunRecord | None = None,
) -> tuple[RecommendationDataset, list[Choice], Settings]:
    """The dataset as its preset cuts it, what the preset chose, and the final settings, checked. A run that resumes chooses what it chose `before`."""
    given = given_options(_kinds(), settings, options)
    saved = first.model.model or (None if own_checkpoint else first.args.resume_from_checkpoint)
    choices = choices_of(first.run.preset, data, given, first.args.use_cpu, saved)
    if before is not None:
        fixed = given.keys() | data_given(data).keys()
        earlier = {name: before.options[name] for name in before.chosen if name not in fixed}
        # An earlier version chose fewer options: those that it did not know stay at their defaults.
        choices = [
            row._replace(value=earlier.get(row.option, row.value))
            for row in choices
            if not before.complete or row.option in (*before.options, *fixed, *CUT)
        ]
    chosen = {row.option: row.value for row in choices if row.option not in (*given, *CUT)}
    final = Settings(*gather(_kinds(), settings, {**chosen, **options}))
    final = final._replace(args=copy.copy(final.args))
    _check(final)
    return cut_as_chosen(data, choices), choices, final


def _check(settings: Settings) -> None:
    """Checks the settings of a training against each other."""
    from onerec_hf.data.collators import PREFIXES_OF_PATHWAYS

    ids, model, sharding, run, args = settings
    if model.model is not None and ids.semantic_ids is not None:
        raise ValueError(BOTH)
    for option, patience in (
        ("--early_stopping_patience", run.early_stopping_patience),
        ("--decay_on_plateau", run.decay_on_plateau),
    ):
        if patience is not None and (args.eval_strategy == "no" or args.metric_for_best_model is None):
            raise ValueError(
                f"{option} needs --eval_strategy steps (or epoch) and --metric_for_best_model, e.g. recall@10"
            )
        if patience is not None and patience < 1:
            raise ValueError(f"{option} must be at least 1; got {patience}")
    check_choice(run.new_items)
    if run.new_items is not None and model.model is None:
        raise ValueError("--new_items goes with --model: a new model is made for all items of the data")
    if run.train_on not in ("windows", "prefixes"):
        raise ValueError(f"--train_on {run.train_on}: choose windows or prefixes")
    if run.train_on == "prefixes" and model.pathways is not None:
        raise ValueError(f"--pathways: {PREFIXES_OF_PATHWAYS}")
    if model.model is not None:
        for option, value in (("--pathways", model.pathways), ("--lifelong", model.lifelong)):
            if value is not None:
                raise ValueError(f"{option} is for a new model: leave it out, the saved one keeps its own")
    if model.lifelong is not None and (run.train_on == "prefixes" or args.packing):
        raise ValueError(
            "--lifelong: what is older than a history differs for each target; leave out --packing, and train on windows (--train_on windows)"
        )
    if run.train_on == "prefixes" and model.model is None and not model.encoder_is_causal:
        raise ValueError(
            "--train_on prefixes needs --encoder_is_causal: a fully visible encoder reads the items that follow a prefix, which are the targets"
        )
    sharding.check(args)
    if sharding.fsdp_size > 1 and model.item_head_evidence:
        raise ValueError(
            "--item_head_evidence is fitted after training on unsharded weights: leave it out, or train without --fsdp_size"
        )
    if sharding.fsdp_size > 1 and model.item_head_rank is not None:
        raise ValueError(
            "--item_head_rank: vectors of low rank are not sharded; leave it out, or train without --fsdp_size"
        )


def stopping(run: TrainSettings) -> list[TrainerCallback]:
    """The callbacks that end a training by validation."""
    from transformers import EarlyStoppingCallback

    from onerec_hf.trainers import PlateauDecayCallback

    callbacks: list[TrainerCallback] = []
    if run.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run.early_stopping_patience))
    if run.decay_on_plateau is not None:
        callbacks.append(PlateauDecayCallback(run.decay_on_plateau))
    return callbacks


def train_generator(
    data: RecommendationDataset,
    folder: Path,
    ids: SemanticIDSettings,
    model_settings: ModelSettings,
    args: OneRecTrainingArguments,
    sharding: ShardingSettings | None = None,
    command: str | None = None,
    can_resume: bool = True,
    save_items: bool = True,
    pace: Pace | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    weights_of: OneRecForConditionalGeneration | None = None,
) -> OneRecTrainer:
    """
    The training itself: everything before the evaluation. Saves the model into `folder` and returns the trainer.

    Args:
        args: its `output_dir` becomes the folder of the checkpoints.
        can_resume: False where Ctrl-C removes the run.
        save_items: save titles and other columns of the items.
        pace: budget, progress and users of evaluations during training.
        callbacks: of the trainer, such as those of `stopping`.
        weights_of: as for `fit_evidence`.

    Raises:
        ValueError: an artefact to start from that is absent, damaged or made for other items, or a budget that no step fits into. `folder` is
            untouched then.
        KeyboardInterrupt: Ctrl-C, with the way to resume.
    """
    from transformers import EarlyStoppingCallback, set_seed

    from onerec_hf.trainers import OneRecTrainer

    pace = pace or Pace()
    if pace.progress is not None:
        pace.progress.stage("semantic IDs")
    set_seed(args.seed)
    if args.device.type == "cpu":
        keep_freed_memory()
    checkpoint = args.resume_from_checkpoint
    model, processor, origin, content = _start(data, ids, model_settings, checkpoint, save_items)
    if processor.lifelong is not None and isinstance(data, InMemoryDataset):
        data = data.with_older(processor.lifelong.longest)
    say(f"model: {model.num_parameters():,} parameters, {len(data.train):,} training examples")
    if sharding is not None:
        model = sharding.shard(model)
    own_checkpoint = resumes_in(folder, args)
    args.output_dir = str(folder / "checkpoints")
    # Trainer would push its checkpoints, not the artefact.
    push, args.push_to_hub = args.push_to_hub, False
    trainer = OneRecTrainer(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=pace.validation(data),
        processing_class=processor,
        callbacks=list(callbacks),
    )
    pace.prepare(trainer, data)
    begin(folder, command, own_checkpoint)
    write_origin(folder, origin, content)
    save_data_options(folder, data, args.eval_exclude_seen)
    save_processor(processor, folder, data.items if save_items else None)
    with resumable(folder, command, can_resume), contextlib.redirect_stdout(sys.stderr):  # Trainer prints its logs
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.remove_callback(EarlyStoppingCallback)  # it would look for its metric in the test results
        pace.report(trainer)
        check_finite(model)
        fit_evidence(model, processor, data, args.seed, args.eval_exclude_seen, weights_of)
        save_trained(trainer, folder)
    args.push_to_hub = push
    return trainer


def _start(
    data: RecommendationDataset,
    ids: SemanticIDSettings,
    settings: ModelSettings,
    checkpoint: str | None,
    save_items: bool,
) -> tuple[OneRecForConditionalGeneration, OneRecProcessor, dict[str, bytes] | SemanticIDs, ItemEncoder | None]:
    """
    Model and processor to train, new or from a checkpoint, model or folder of semantic IDs; the origin of the semantic IDs; and the encoder of content
    vectors that are new.
    """
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    places = {"--resume_from_checkpoint": checkpoint, "--model": settings.model, "--semantic_ids": ids.semantic_ids}
    option, place = next(((name, value) for name, value in places.items() if value is not None), ("", None))
    if place is None:
        origin = fit_catalogue(data, ids)
        say(origin.report.table())
        processor = OneRecProcessor.from_catalogue(origin.catalogue, max_history=data.max_history)
    else:
        processor = load_processor(option, place)
        check_catalogue(f"{option} {place}", catalogue_of(processor), data)
        origin = find_origin(Path(place).resolve().parents[1] if checkpoint is not None else place, save_items)
    if place is None or option == "--semantic_ids":
        processor.max_history = data.max_history
        set_features(processor, data)
        content = content_of_catalogue(data, processor) if settings.item_head_content else None
        vectors, encoder = (None, None) if content is None else content
        model = new_model(settings, processor, data.session_length, vectors)
        reads: Any = model.config.features
        processor.pathways = None if reads is None else reads.pathways
        processor.lifelong = lifelong_history(data, ids, settings, processor)
        return model, processor, origin, encoder
    model = load_model(option, place, settings.attn_implementation)
    model.parallel_decoder = None  # trained on weights that change
    set_ranking_weights(model, settings.item_score_weight, settings.decoder_weight)
    return model, processor, origin, None


def report(
    trainer: OneRecTrainer,
    folder: Path,
    data: RecommendationDataset,
    rows: list[dict[str, Any]],
    command: str | None,
    choices: Sequence[Choice] = (),
    refitted: Refit | None = None,
    verdict: Verdict | None = None,
    panels: Sequence[Panel] = (),
    resumed: Sequence[Mapping[str, Any]] = (),
    worth: Sequence[Worth] = (),
) -> None:
    """
    Writes `results.json`, the training report, the map of semantic IDs and the card into the model's folder, and uploads the folder with
    `push_to_hub`. Results and card have the `choices` of the settings and the verdict.
    """
    from huggingface_hub import HfApi

    from onerec_hf.hub_cards import Training, write_generator_card
    from onerec_hf.modeling.items_file import saved_items

    args, repo_id = cast("OneRecTrainingArguments", trainer.args), None
    model = cast("OneRecForConditionalGeneration", trainer.model)
    protocol = data.protocol + about_lately(model)
    about = {} if verdict is None else {"verdict": str(verdict), "differences": verdict.as_json()}
    write_results(
        folder / "results.json",
        rows,
        command=command,
        seed=args.seed,
        dataset=data.name,
        protocol=protocol,
        settings=[row._asdict() for row in choices],
        **({"resumed_with": list(resumed)} if resumed else {}),
        **({} if refitted is None else {"refit": refitted.facts}),
        **about,
    )
    processor = cast("OneRecProcessor", trainer.processing_class)
    write_training_report(folder, panels, [protocol, "" if verdict is None else verdict.sentences])
    write_id_map(folder, catalogue_of(processor), saved_items(folder, catalogue_of(processor)))
    hub = HfApi(token=args.hub_token)
    if args.push_to_hub:
        name = args.hub_model_id or folder.resolve().name
        repo_id = hub.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    write_generator_card(
        folder,
        processor,
        model,
        data,
        protocol,
        rows,
        repo_id=repo_id,
        exclude_seen=args.eval_exclude_seen,
        num_beams=args.eval_num_beams,
        counts=data.counts(),
        choices=[(row.option, shown(row.value), row.reason) for row in choices],
        training=Training.of(trainer),
        tokens_per_expert=trainer.tokens_per_expert,
        command=command,
        features=[(each.side, each.name, each.loss, each.error) for each in worth],
        note="" if refitted is None else refitted.note,
        verdict="" if verdict is None else verdict.sentences,
        data_options=shlex.join(option_words({**data.options, "exclude_seen": args.eval_exclude_seen})),
    )
    recorded_in(folder, trainer.model, processor)
    pictures = f", pictures of the training in {REPORT_HTML}" if panels else ""
    say(f"saved to {folder}{pictures}; recommend with it: onerec-hf recommend --model {folder} --help")
    if repo_id is not None:
        hub.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=NOT_UPLOADED)
        say(f"uploaded to {repo_id}")
