"""`onerec-hf evaluate`: a saved model ranks the whole catalogue for held-out items, with popularity and item-kNN as baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from onerec_hf.cli.arguments import command_line, options_of, parse_given
from onerec_hf.evaluation.results import write_results
from onerec_hf.workflows.data_options import differences, read_data_options
from onerec_hf.workflows.distributed import is_first, say
from onerec_hf.workflows.evaluation import EvaluateSettings, evaluate
from onerec_hf.workflows.loading import load_dataset
from onerec_hf.workflows.results import ranking_table
from onerec_hf.workflows.settings import DataSettings


@dataclass
class EvaluateOptions:
    """Output of the results."""

    json: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def main(argv: list[str]) -> None:
    given = parse_given((EvaluateSettings, DataSettings, EvaluateOptions), argv, "evaluate")
    how, options = options_of(EvaluateSettings, given), EvaluateOptions(**options_of(EvaluateOptions, given))
    settings = EvaluateSettings(**how)
    settings.check()
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(
            f"--json {options.json}: there is no folder {Path(options.json).absolute().parent}; create it first"
        )
    dataset = load_dataset(**options_of(DataSettings, given), model=settings.model)
    result = evaluate(dataset, **how)
    if not is_first():
        return
    if options.json:
        chosen = (
            {**dataset.options, "exclude_seen": settings.exclude_seen} if "exclude_seen" in how else dataset.options
        )
        differ = differences(chosen, read_data_options("--model", cast("str", settings.model)))
        write_results(
            options.json,
            result.rows,
            command=command_line("evaluate", argv),
            dataset=dataset.name,
            split=settings.split,
            protocol=dataset.protocol,
            **({} if settings.dtype == "float32" else {"dtype": settings.dtype}),
            **({"other_data_options": differ} if differ else {}),
        )
        say(f"wrote {options.json}")
    print(ranking_table(result.rows))
