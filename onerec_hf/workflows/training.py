"""From a dataset to a trained, evaluated and saved generator: semantic IDs, training, ranking with baselines, results and card."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.workflows.artefact import (
    catalogue_of,
    find_origin,
    load_model,
    load_processor,
    new_model,
    save_processor,
    save_trained,
    set_ranking_weights,
    write_origin,
)
from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset, check_catalogue
from onerec_hf.workflows.distributed import is_first, say, wait
from onerec_hf.workflows.evaluation import evaluate_beside_baselines
from onerec_hf.workflows.evidence import content_of_catalogue, fit_evidence
from onerec_hf.workflows.loading import as_dataset
from onerec_hf.workflows.results import GeneratorResult
from onerec_hf.workflows.run_folder import UNFINISHED_RUN, begin, finish, open_folder, resumable, resumes_in
from onerec_hf.workflows.semantic_ids import fit_catalogue
from onerec_hf.workflows.settings import DataSettings, ModelOutputSettings, ModelSettings, SemanticIDSettings, gather
from onerec_hf.workflows.sharding import ShardingSettings

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.semantic_ids import SemanticIDs
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

NOT_UPLOADED = ["checkpoints/**", ".unfinished/**", UNFINISHED_RUN, "*.tmp"]


@dataclass
class TrainSettings(ModelOutputSettings):
    """Training examples, early stopping, evaluation and checkpoints."""

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
    baselines: bool = field(
        default=True,
        metadata={"help": "Also rank with popularity and item-kNN, which need all training sequences in memory."},
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Keep output_dir/checkpoints (weights, optimizer, pickles) after the run; they are for resuming."
        },
    )


def train(
    data: RecommendationDataset | DataSettings, *settings: object, command: str | None = None, **options
) -> GeneratorResult:
    """
    Trains a generator and saves it: fits semantic IDs (or takes those of a folder, or continues from a saved model), trains, ranks the test
    items with model and baselines, and writes model, processor, catalogue, `results.json` and card into `output_dir`. With
    `resume_from_checkpoint="last"` the same call resumes a run that was killed. Under torchrun every rank makes the call.

    Args:
        data: a dataset, or the settings to load one after the options are checked.
        settings: [`SemanticIDSettings`], [`ModelSettings`], [`ShardingSettings`], [`TrainSettings`] and
            [`~onerec_hf.trainers.OneRecTrainingArguments`], each optional, in any order.
        command: the command line, for results and card.
        options: single fields of these settings, e.g. `hidden_size=64, num_train_epochs=3`; `output_dir` where no training arguments are
            given.

    Raises:
        ValueError: options that do not fit together or to the data, or a damaged artefact to start from. `output_dir` is untouched then.
        FileExistsError: `output_dir` is not empty and `overwrite` is not set.
        RunComplete: the run to resume is complete.
        KeyboardInterrupt: Ctrl-C, with the way to resume.
        TypeError: an unknown option.

    Example:
        >>> result = train(load_dataset(interactions="ratings.csv"), output_dir="runs/mine", num_train_epochs=3)  # doctest: +SKIP
        >>> result.metrics["onerec/recall@10"], result.model, result.processor  # doctest: +SKIP
    """
    ids, model, sharding, run, args = _settings(settings, options)
    folder = Path(str(args.output_dir))
    open_folder(folder, run.overwrite, args)
    started = time.perf_counter()
    dataset = as_dataset(data)
    if run.train_on == "prefixes":
        if not isinstance(dataset, InMemoryDataset):
            raise ValueError(
                "--train_on goes with --interactions; what a prepared folder holds was chosen by `onerec-hf prepare --train_on`"
            )
        dataset = dataset.on_prefixes()
    trainer = train_generator(
        dataset, folder, ids, model, args, sharding, run.early_stopping_patience, command, save_items=run.save_items
    )
    with resumable(folder, command):
        rows = evaluate_beside_baselines(trainer, dataset, "test", run.baselines)
    if is_first():
        rows.append(result_row("seconds", time.perf_counter() - started, "s"))
        report(trainer, folder, dataset, rows, command)
        finish(folder, run.keep_checkpoints)
    wait()
    return GeneratorResult(rows, folder, trainer)


def _settings(
    settings: tuple[object, ...], options: dict[str, Any]
) -> tuple[SemanticIDSettings, ModelSettings, ShardingSettings, TrainSettings, OneRecTrainingArguments]:
    """The settings of a training, checked against each other."""
    from onerec_hf.trainers import OneRecTrainingArguments

    kinds = (SemanticIDSettings, ModelSettings, ShardingSettings, TrainSettings, OneRecTrainingArguments)
    ids, model, sharding, run, args = gather(kinds, settings, options)
    if model.model is not None and ids.semantic_ids is not None:
        raise ValueError("pass --model, which has its semantic IDs, or --semantic_ids for a new model; not both")
    if run.early_stopping_patience is not None and (args.eval_strategy == "no" or args.metric_for_best_model is None):
        raise ValueError(
            "--early_stopping_patience needs --eval_strategy steps (or epoch) and --metric_for_best_model, e.g. recall@10"
        )
    if run.train_on not in ("windows", "prefixes"):
        raise ValueError(f"--train_on {run.train_on}: choose windows or prefixes")
    if run.train_on == "prefixes" and model.model is None and not model.encoder_is_causal:
        raise ValueError(
            "--train_on prefixes needs --encoder_is_causal: a fully visible encoder reads the items that follow a prefix, which are the targets"
        )
    sharding.check(args)
    return ids, model, sharding, run, copy.copy(args)


def train_generator(
    data: RecommendationDataset,
    folder: Path,
    ids: SemanticIDSettings,
    model_settings: ModelSettings,
    args: OneRecTrainingArguments,
    sharding: ShardingSettings | None = None,
    early_stopping_patience: int | None = None,
    command: str | None = None,
    can_resume: bool = True,
    save_items: bool = True,
) -> OneRecTrainer:
    """
    The training itself: everything before the evaluation. Saves the model into `folder` and returns the trainer.

    Args:
        args: its `output_dir` becomes the folder of the checkpoints.
        can_resume: False where Ctrl-C removes the run.
        save_items: save titles and other columns of the items.

    Raises:
        ValueError: an artefact to start from that is absent, damaged or made for other items. `folder` is untouched then.
        KeyboardInterrupt: Ctrl-C, with the way to resume.
    """
    from transformers import EarlyStoppingCallback, set_seed

    from onerec_hf.trainers import OneRecTrainer

    set_seed(args.seed)
    checkpoint = args.resume_from_checkpoint
    model, processor, origin = _start(data, ids, model_settings, checkpoint, save_items)
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
        eval_dataset=data.validation,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else None,
    )
    begin(folder, command, own_checkpoint)
    write_origin(folder, origin)
    save_processor(processor, folder, data.items if save_items else None)
    with resumable(folder, command, can_resume), contextlib.redirect_stdout(sys.stderr):  # Trainer prints its logs
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.remove_callback(EarlyStoppingCallback)  # it would look for its metric in the test results
        fit_evidence(model, processor, data, args.seed)
        save_trained(trainer, folder)
    args.push_to_hub = push
    return trainer


def _start(
    data: RecommendationDataset,
    ids: SemanticIDSettings,
    settings: ModelSettings,
    checkpoint: str | None,
    save_items: bool,
) -> tuple[OneRecForConditionalGeneration, OneRecProcessor, dict[str, bytes] | SemanticIDs]:
    """Model and processor to train, new or from a checkpoint, model or folder of semantic IDs; and the origin of the semantic IDs."""
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
        content = content_of_catalogue(data, processor) if settings.item_head_content else None
        return new_model(settings, processor, data.session_length, content), processor, origin
    model = load_model(option, place, settings.attn_implementation)
    set_ranking_weights(model, settings.item_score_weight, settings.decoder_weight)
    return model, processor, origin


def report(
    trainer: OneRecTrainer,
    folder: Path,
    data: RecommendationDataset,
    rows: list[dict[str, Any]],
    command: str | None,
) -> None:
    """Writes `results.json` and the card into the model's folder, and uploads the folder with `push_to_hub`."""
    from huggingface_hub import HfApi

    from onerec_hf.hub_cards import Training, write_generator_card

    args, repo_id = cast("OneRecTrainingArguments", trainer.args), None
    write_results(
        folder / "results.json", rows, command=command, seed=args.seed, dataset=data.name, protocol=data.protocol
    )
    hub = HfApi(token=args.hub_token)
    if args.push_to_hub:
        name = args.hub_model_id or folder.resolve().name
        repo_id = hub.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    write_generator_card(
        folder,
        cast("OneRecProcessor", trainer.processing_class),
        cast("OneRecForConditionalGeneration", trainer.model),
        data,
        data.protocol,
        rows,
        repo_id=repo_id,
        exclude_seen=args.eval_exclude_seen,
        num_beams=args.eval_num_beams,
        counts=data.counts(),
        training=Training.of(trainer),
        tokens_per_expert=trainer.tokens_per_expert,
        command=command,
    )
    say(f"saved to {folder}; recommend with it: onerec-hf recommend --model {folder} --help")
    if repo_id is not None:
        hub.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=NOT_UPLOADED)
        say(f"uploaded to {repo_id}")
