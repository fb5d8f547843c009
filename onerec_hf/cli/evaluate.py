"""`onerec-hf evaluate`: a saved model ranks the whole catalogue for held-out items, beside popularity and item-kNN."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.cli.arguments import DataArguments, parse
from onerec_hf.cli.steps import check_catalogue, prepare_data, say
from onerec_hf.cli.train import evaluate_beside_baselines, print_results
from onerec_hf.evaluation.results import write_results


@dataclass
class EvaluateArguments:
    """What is evaluated and how."""

    model: str | None = field(default=None, metadata={"help": "A saved OneRec: folder or Hub id."})
    split: str = field(default="test", metadata={"help": "test or validation."})
    top_k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "The k of the metrics."})
    num_beams: int = field(default=50, metadata={"help": "Beams per user."})
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON."})


def main(argv: list[str]) -> None:
    args, data_args = parse((EvaluateArguments, DataArguments), argv, "evaluate")
    if args.model is None:
        raise ValueError("give --model: the folder or Hub id of a saved OneRec")
    if args.split not in ("test", "validation"):
        raise ValueError(f"--split is test or validation, not {args.split!r}")
    import tempfile

    import torch
    from transformers import AutoModelForSeq2SeqLM

    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    processor = OneRecProcessor.from_pretrained(args.model)
    data = prepare_data(data_args)
    check_catalogue(processor, data)
    with tempfile.TemporaryDirectory() as scratch:
        training_args = OneRecTrainingArguments(
            scratch,
            per_device_eval_batch_size=args.batch_size,
            eval_top_k=args.top_k,
            eval_num_beams=args.num_beams,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        trainer = OneRecTrainer(
            AutoModelForSeq2SeqLM.from_pretrained(args.model), training_args, processing_class=processor
        )
        rows = evaluate_beside_baselines(trainer, data, args.split)
    if args.json:
        write_results(args.json, rows, dataset=data.source.name, protocol=data.split.description)
        say(f"wrote {args.json}")
    print_results(rows)
