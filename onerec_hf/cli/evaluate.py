"""`onerec-hf evaluate`: a saved model ranks the whole catalogue for held-out items, beside popularity and item-kNN."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from onerec_hf.cli.arguments import DataArguments, command_line, parse
from onerec_hf.cli.train import evaluate_beside_baselines, print_results
from onerec_hf.evaluation.results import write_results
from onerec_hf.workflows.distributed import is_first, joined_on_cpu
from onerec_hf.workflows.steps import check_catalogue, load_model, load_processor, prepare_data, say


@dataclass
class EvaluateArguments:
    """What is evaluated and how."""

    model: str | None = field(default=None, metadata={"help": "A saved OneRec: folder or Hub id."})
    split: str = field(default="test", metadata={"help": "test or validation."})
    top_k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "The k of the metrics."})
    num_beams: int = field(default=50, metadata={"help": "Beams per user; at least the largest k."})
    exclude_seen: bool = field(default=True, metadata={"help": "Leave out the items of a user's history."})
    baselines: bool = field(
        default=True,
        metadata={
            "help": "Rank with popularity and item-kNN beside the model; they hold all training sequences in memory."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON."})


def main(argv: list[str]) -> None:
    args, data_args = parse((EvaluateArguments, DataArguments), argv, "evaluate")
    if args.model is None:
        raise ValueError("give --model: the folder or Hub id of a saved OneRec")
    if args.split not in ("test", "validation"):
        raise ValueError(f"--split is test or validation, not {args.split!r}")
    if min(args.top_k) < 1 or args.num_beams < max(args.top_k) or args.batch_size < 1:
        raise ValueError(
            f"--top_k {' '.join(map(str, args.top_k))} with --num_beams {args.num_beams} and --batch_size {args.batch_size}: all must be at "
            "least 1, and num_beams at least the largest top_k"
        )
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}; make it first")
    import tempfile

    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    processor = load_processor("--model", args.model)
    model = load_model("--model", args.model)
    data = prepare_data(data_args)
    check_catalogue(f"--model {args.model}", processor, data)
    with tempfile.TemporaryDirectory() as scratch:
        training_args = OneRecTrainingArguments(
            scratch,
            per_device_eval_batch_size=args.batch_size,
            eval_top_k=args.top_k,
            eval_num_beams=args.num_beams,
            eval_exclude_seen=args.exclude_seen,
            use_cpu=joined_on_cpu(),
        )
        trainer = OneRecTrainer(model, training_args, processing_class=processor)
        rows = evaluate_beside_baselines(trainer, data, args.split, args.baselines)
    if not is_first():
        return
    if args.json:
        write_results(
            args.json,
            rows,
            command=command_line("evaluate", argv),
            dataset=data.source.name,
            split=args.split,
            protocol=data.protocol,
        )
        say(f"wrote {args.json}")
    print_results(rows)
