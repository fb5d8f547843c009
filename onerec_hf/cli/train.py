"""`onerec-hf train`: interactions to a saved artefact (model, processor, catalogue, card) and its results."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onerec_hf.cli.arguments import DataArguments, ModelArguments, OutputArguments, SemanticIDArguments, parse
from onerec_hf.cli.steps import (
    PreparedData,
    baseline_rankings,
    check_catalogue,
    claim_folder,
    fit_catalogue,
    new_model,
    prepare_data,
    say,
    table,
)
from onerec_hf.evaluation.results import result_row, write_results

if TYPE_CHECKING:
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

CODEBOOKS_NAME = "codebooks.safetensors"


@dataclass
class TrainArguments(OutputArguments):
    """How training ends and where it goes."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations without a better metric_for_best_model after which training stops; off when not given."
        },
    )


def main(argv: list[str]) -> None:
    from onerec_hf.trainers import OneRecTrainingArguments

    data_args, id_args, model_args, run_args, training_args = parse(
        (DataArguments, SemanticIDArguments, ModelArguments, TrainArguments, OneRecTrainingArguments), argv, "train"
    )
    if training_args.output_dir is None:
        raise ValueError("give --output_dir: the folder that shall hold the model")
    resuming = training_args.resume_from_checkpoint is not None
    folder = Path(training_args.output_dir) if resuming else claim_folder(training_args.output_dir, run_args.overwrite)
    started = time.perf_counter()
    data = prepare_data(data_args)
    trainer = train(data, folder, data_args, id_args, model_args, training_args, run_args.early_stopping_patience)
    rows = evaluate_beside_baselines(trainer, data, "test")
    rows.append(result_row("seconds", time.perf_counter() - started, "s"))
    save(trainer, folder, data, rows)
    print_results(rows)


def train(
    data: PreparedData,
    folder: Path,
    data_args: DataArguments,
    id_args: SemanticIDArguments,
    model_args: ModelArguments,
    training_args: OneRecTrainingArguments,
    early_stopping_patience: int | None = None,
) -> OneRecTrainer:
    """Fits semantic IDs (or takes those of the model or checkpoint to go on from), trains, and returns the trainer."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, EarlyStoppingCallback, set_seed

    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer

    set_seed(training_args.seed)
    if training_args.resume_from_checkpoint is not None:
        processor = OneRecProcessor.from_pretrained(folder)
        model = new_model(model_args, processor, data_args.session_length)
    elif model_args.model is not None:
        processor = OneRecProcessor.from_pretrained(model_args.model)
        model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model)
    else:
        if id_args.semantic_ids is not None:
            processor = OneRecProcessor.from_pretrained(id_args.semantic_ids)
            processor.max_history = data_args.max_history
        else:
            fitted = fit_catalogue(data, id_args)
            processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history)
            fitted.quantizer.save(folder / CODEBOOKS_NAME)
        processor.save_pretrained(folder)  # a resumed run takes these IDs, not newly fitted ones
        model = new_model(model_args, processor, data_args.session_length)
    check_catalogue(processor, data)
    say(f"model: {model.num_parameters():,} parameters, {len(data.split.train):,} training examples")
    training_args.output_dir = str(folder / "checkpoints")
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    trainer = OneRecTrainer(
        model,
        training_args,
        train_dataset=data.split.train,
        eval_dataset=data.split.validation,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    return trainer


def evaluate_beside_baselines(trainer: OneRecTrainer, data: PreparedData, split: str) -> list[dict]:
    """Result rows of the model and of popularity and item-kNN on a split: full catalogue, the user's seen items left out."""
    from onerec_hf.evaluation import ranking_metrics

    metrics = trainer.evaluate(getattr(data.split, split), metric_key_prefix=split)
    ks = tuple(trainer.args.eval_top_k)
    rankings, relevant = baseline_rankings(data, split, max(ks))
    scores = {name: ranking_metrics(ranked, relevant, ks, len(data.item_ids)) for name, ranked in rankings.items()}
    rows = [
        result_row(f"onerec/{metric}", metrics[f"{split}_{metric}"], "share", against=f"popularity/{metric}")
        for metric in scores["popularity"]
    ]
    rows += [
        result_row(f"{name}/{metric}", value, "share")
        for name, values in scores.items()
        for metric, value in values.items()
    ]
    rows.append(result_row("illegal_share", metrics[f"{split}_illegal_share"], "share"))
    return rows


def save(trainer: OneRecTrainer, folder: Path, data: PreparedData, rows: list[dict]) -> None:
    """Writes model, processor, catalogue, card and `results.json` into `folder`."""
    from onerec_hf.hub_cards import write_generator_card

    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # Trainer's pickle: nothing in an artefact is unpickled
    write_results(
        folder / "results.json",
        rows,
        seed=trainer.args.seed,
        dataset=data.source.name,
        protocol=data.split.description,
    )
    write_generator_card(folder, trainer.processing_class, trainer.model, data.source, data.split.description, rows)
    say(f"saved to {folder}")


def print_results(rows: list[dict]) -> None:
    """The metrics as a table, a model per line."""
    metrics = [row["name"].split("/")[1] for row in rows if row["name"].startswith("onerec/")]
    values = {row["name"]: row["value"] for row in rows}
    models = ("popularity", "item_knn", "onerec")
    print(
        table(
            [[name, *(f"{values[f'{name}/{metric}']:.4f}" for metric in metrics)] for name in models], ["", *metrics]
        )
    )
