"""`onerec-hf train`: interactions to a saved artefact (model, processor, catalogue, card) and its results."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from onerec_hf.cli.arguments import (
    DataArguments,
    ModelArguments,
    OutputArguments,
    SemanticIDArguments,
    command_line,
    parse,
)
from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.run_folder import begin, finish, open_folder, resumes_in
from onerec_hf.workflows.sharding import ShardingArguments
from onerec_hf.workflows.steps import (
    UNFINISHED_RUN,
    PreparedData,
    baseline_rankings,
    check_catalogue,
    discard,
    find_origin,
    fit_catalogue,
    load_model,
    load_processor,
    new_model,
    prepare_data,
    save_trained,
    say,
    table,
    write_origin,
)

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments


NOT_UPLOADED = ["checkpoints/**", ".unfinished/**", UNFINISHED_RUN, "*.tmp"]


@dataclass
class TrainArguments(OutputArguments):
    """What is trained on, how training ends and where it goes."""

    train_on: str = field(
        default="windows",
        metadata={
            "help": "windows (a history per session) or prefixes (a history once for all its sessions; with --encoder_is_causal)."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations without a better metric_for_best_model after which training stops; off when not given."
        },
    )
    baselines: bool = field(
        default=True,
        metadata={
            "help": "Rank with popularity and item-kNN beside the model; they hold all training sequences in memory."
        },
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Keep output_dir/checkpoints (weights, optimizer, pickles) once the model is complete; they serve resuming."
        },
    )


def main(argv: list[str]) -> None:
    from onerec_hf.trainers import OneRecTrainingArguments

    data_args, id_args, model_args, sharding, run_args, training_args = parse(
        (
            DataArguments,
            SemanticIDArguments,
            ModelArguments,
            ShardingArguments,
            TrainArguments,
            OneRecTrainingArguments,
        ),
        argv,
        "train",
        required=["--output_dir"],
    )
    if model_args.model is not None and id_args.semantic_ids is not None:
        raise ValueError("give --model, which has its semantic IDs, or --semantic_ids for a new model; not both")
    if run_args.early_stopping_patience is not None and (
        training_args.eval_strategy == "no" or training_args.metric_for_best_model is None
    ):
        raise ValueError(
            "--early_stopping_patience needs --eval_strategy steps (or epoch) and --metric_for_best_model, e.g. recall@10"
        )
    if run_args.train_on not in ("windows", "prefixes"):
        raise ValueError(f"--train_on {run_args.train_on}: choose windows or prefixes")
    if run_args.train_on == "prefixes" and model_args.model is None and not model_args.encoder_is_causal:
        raise ValueError(
            "--train_on prefixes needs --encoder_is_causal: a fully visible encoder reads the items that follow a prefix, which are the targets"
        )
    if run_args.train_on == "prefixes" and data_args.prepared is not None:
        raise ValueError(
            "--train_on goes with --interactions; what a prepared folder holds was chosen by `onerec-hf prepare --train_on`"
        )
    sharding.check(training_args)
    folder = Path(training_args.output_dir)
    open_folder(folder, run_args.overwrite, training_args)
    command = command_line("train", argv)
    started = time.perf_counter()
    data = prepare_data(data_args)
    if run_args.train_on == "prefixes":
        data = on_prefixes(data, data_args)
    trainer = train(
        data,
        folder,
        data_args,
        id_args,
        model_args,
        training_args,
        run_args.early_stopping_patience,
        command,
        sharding,
    )
    with resumable(folder, command):
        rows = evaluate_beside_baselines(trainer, data, "test", run_args.baselines)
    if not is_first():
        return
    rows.append(result_row("seconds", time.perf_counter() - started, "s"))
    report(trainer, folder, data, rows, command)
    finish(folder, run_args.keep_checkpoints)
    print_results(rows)


def on_prefixes(data: PreparedData, args: DataArguments) -> PreparedData:
    """The data with each training history once for all the sessions that follow its prefixes, in place of windows."""
    from onerec_hf.data import prefix_examples

    prefixes = prefix_examples(data.split.train_sequences, args.session_length, args.max_history, args.stride)
    note = (
        f" The windows are read as {len(prefixes):,} histories, each once for all its sessions; beyond {args.max_history} items a session "
        f"reads the latest {args.max_history - args.max_history // 2 + 1} to {args.max_history}."
    )
    return replace(data, split=replace(data.split, train=prefixes), protocol=data.protocol + note)


def train(
    data: PreparedData,
    folder: Path,
    data_args: DataArguments,
    id_args: SemanticIDArguments,
    model_args: ModelArguments,
    training_args: OneRecTrainingArguments,
    early_stopping_patience: int | None = None,
    command: str | None = None,
    sharding: ShardingArguments | None = None,
) -> OneRecTrainer:
    """
    Fits semantic IDs (or takes those of the model or checkpoint to go on from), trains, saves the model into `folder` and returns the
    trainer.

    Args:
        command: the command line to resume with after Ctrl-C; nothing is kept then when not given.
        sharding: how ranks share the model; each has a whole one when not given.

    Raises:
        ValueError: an artefact to go on from that is absent, damaged or made for other items. `folder` is untouched then.
        KeyboardInterrupt: Ctrl-C, with the way to go on.
    """
    from transformers import EarlyStoppingCallback, set_seed

    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer

    set_seed(training_args.seed)
    checkpoint = training_args.resume_from_checkpoint
    origins = {
        "--resume_from_checkpoint": checkpoint,
        "--model": model_args.model,
        "--semantic_ids": id_args.semantic_ids,
    }
    option, origin = next(((name, value) for name, value in origins.items() if value is not None), ("", None))
    made_from: Any = None
    if origin is None:
        made_from = fit_catalogue(data, id_args)
        say(made_from.report.table())
        processor = OneRecProcessor.from_catalogue(made_from.catalogue, max_history=data_args.max_history)
    else:
        processor = load_processor(option, origin)
        check_catalogue(f"{option} {origin}", processor, data)
        made_from = find_origin(Path(origin).resolve().parents[1] if checkpoint is not None else origin)
    if origin is None or option == "--semantic_ids":
        processor.max_history = data_args.max_history
        model = new_model(model_args, processor, data_args.session_length)
    else:
        model = load_model(option, origin, model_args.attn_implementation)
        if model_args.session_loss_weights is not None:
            model.config.session_loss_weights = model_args.session_loss_weights
            model.config.validate_architecture()
    say(f"model: {model.num_parameters():,} parameters, {len(data.split.train):,} training examples")
    if sharding is not None:
        model = sharding.shard(model)
    own_checkpoint = resumes_in(folder, training_args)
    training_args.output_dir = str(folder / "checkpoints")
    # Trainer would push its checkpoints, not the artefact.
    push, training_args.push_to_hub = training_args.push_to_hub, False
    trainer = OneRecTrainer(
        model,
        training_args,
        train_dataset=data.split.train,
        eval_dataset=data.split.validation,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else None,
    )
    begin(folder, command, own_checkpoint)
    write_origin(folder, made_from)
    if is_first():
        processor.save_pretrained(folder)
    with resumable(folder, command), contextlib.redirect_stdout(sys.stderr):  # Trainer prints its logs
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.remove_callback(EarlyStoppingCallback)  # it would look for its metric in the test results
        save_trained(trainer, folder)
    training_args.push_to_hub = push
    return trainer


@contextlib.contextmanager
def resumable(folder: Path, command: str | None) -> Iterator[None]:
    """
    Says after Ctrl-C what there is to go on with; where there is nothing, takes back what the run has written.

    Raises:
        KeyboardInterrupt: in place of the one that came.
    """
    try:
        yield
    except KeyboardInterrupt:
        from onerec_hf.trainers import newest_checkpoint

        last = newest_checkpoint(folder / "checkpoints")
        if command is not None and last is not None:
            hint = (
                f"The checkpoint {last} is kept; go on with:\n  {command} --resume_from_checkpoint {shlex.quote(last)}"
            )
        elif any(folder.glob("model*.safetensors")):
            hint = f"The trained model is in {folder}; it is not evaluated yet: onerec-hf evaluate --help"
        else:
            discard(folder)
            hint = "Nothing is kept; start again."
        raise KeyboardInterrupt(hint) from None


def evaluate_beside_baselines(
    trainer: OneRecTrainer, data: PreparedData, split: str, baselines: bool = True
) -> list[dict[str, Any]]:
    """
    Result rows of the model and, with `baselines`, of popularity and item-kNN on a split: full catalogue, seen items left out as `trainer.args` says. Ranks share
    the model's users; the rows come to the first rank, the others get none.
    """
    from onerec_hf.evaluation import ranking_metrics

    args, processor = cast("OneRecTrainingArguments", trainer.args), cast("OneRecProcessor", trainer.processing_class)
    catalogue = processor.catalogue
    assert catalogue is not None
    args.predict_with_generate, args.prediction_loss_only = True, False  # whatever evaluations during training did
    trainer.compute_metrics = trainer.compute_metrics or trainer.compute_ranking_metrics
    with contextlib.redirect_stdout(sys.stderr):
        metrics = trainer.evaluate(getattr(data.split, split), metric_key_prefix=split)
    if not is_first():
        return []
    ks, scores = tuple(args.eval_top_k), {}
    if baselines:
        rankings, relevant = baseline_rankings(data, catalogue, split, max(ks), args.eval_exclude_seen)
        scores = {name: ranking_metrics(ranked, relevant, ks, len(catalogue)) for name, ranked in rankings.items()}
    measured = [name for name in metrics if "@" in name]
    rows = [
        result_row(
            f"onerec/{name.removeprefix(f'{split}_')}",
            metrics[name],
            "share",
            against=f"popularity/{name.removeprefix(f'{split}_')}" if baselines else None,
        )
        for name in measured
    ]
    rows += [
        result_row(f"{name}/{metric}", value, "share")
        for name, values in scores.items()
        for metric, value in values.items()
    ]
    rows.append(result_row("invalid_id_rate", metrics[f"{split}_invalid_id_rate"], "share"))
    return rows


def report(trainer: OneRecTrainer, folder: Path, data: PreparedData, rows: list[dict[str, Any]], command: str) -> None:
    """Writes `results.json` and the card beside the model, and uploads the folder where `push_to_hub` asks for it."""
    from huggingface_hub import HfApi

    from onerec_hf.hub_cards import Training, write_generator_card

    args, repo_id = cast("OneRecTrainingArguments", trainer.args), None
    write_results(
        folder / "results.json",
        rows,
        command=command,
        seed=args.seed,
        dataset=data.source.name,
        protocol=data.protocol,
    )
    hub = HfApi(token=args.hub_token)
    if args.push_to_hub:
        name = args.hub_model_id or folder.resolve().name
        repo_id = hub.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    write_generator_card(
        folder,
        cast("OneRecProcessor", trainer.processing_class),
        cast("OneRecForConditionalGeneration", trainer.model),
        data.source,
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
    say(f"saved to {folder}")
    if repo_id is not None:
        hub.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=NOT_UPLOADED)
        say(f"uploaded to {repo_id}")


def print_results(rows: list[dict[str, Any]]) -> None:
    """The metrics as a table, a model per line."""
    metrics = [row["name"].split("/")[1] for row in rows if row["name"].startswith("onerec/")]
    values = {row["name"]: row["value"] for row in rows}
    there = {row["name"].split("/")[0] for row in rows}
    models = [name for name in ("popularity", "item_knn", "onerec") if name in there]
    print(
        table(
            [[name, *(f"{values[f'{name}/{metric}']:.4f}" for metric in metrics)] for name in models], ["", *metrics]
        )
    )
