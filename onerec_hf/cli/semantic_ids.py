"""
`onerec-hf semantic-ids fit`: items to semantic IDs: a processor with its catalogue, the codebooks and a report.
`onerec-hf semantic-ids report`: quantisers side by side on the same items, as a table and a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from onerec_hf.cli.arguments import DataArguments, OutputArguments, SemanticIDArguments, command_line, parse
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.run_folder import begin, finish
from onerec_hf.workflows.steps import (
    check_folder,
    embed_items,
    fit_catalogue,
    is_unfinished,
    prepare_data,
    say,
    write_bytes,
    write_origin,
)


@dataclass
class FitArguments(OutputArguments):
    """Where the semantic IDs go."""

    output_dir: str = field(
        default="semantic-ids", metadata={"help": "Folder for processor, catalogue, codebooks and report."}
    )


@dataclass
class ReportArguments:
    """What is compared, and where the comparison goes."""

    quantizers: list[str] = field(
        default_factory=lambda: ["balanced", "kmeans", "rq-vae"], metadata={"help": "Quantisers to compare."}
    )
    json: str | None = field(default=None, metadata={"help": "File for the reports as JSON."})
    png: str | None = field(default=None, metadata={"help": "File for the picture."})


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        argv = ["fit", *argv]
    if argv[:1] not in (["fit"], ["report"]):
        raise ValueError("say what to do: onerec-hf semantic-ids fit --help, or onerec-hf semantic-ids report --help")
    (fit if argv[0] == "fit" else report)(argv[1:])


def fit(argv: list[str]) -> None:
    """Semantic IDs by one quantiser, into a folder."""
    data_args, id_args, args = parse((DataArguments, SemanticIDArguments, FitArguments), argv, "semantic-ids fit")
    if id_args.semantic_ids is not None:
        raise ValueError("--semantic_ids is for `onerec-hf train`: fit makes new ones, into --output_dir")
    folder = check_folder(args.output_dir, args.overwrite or is_unfinished(args.output_dir))
    fitted = fit_catalogue(prepare_data(data_args), id_args)

    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    begin(folder, command_line("semantic-ids fit", argv))
    if not is_first():
        return
    write_origin(folder, fitted)
    # The catalogue is written last: without it there is nothing to train with.
    OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history).save_pretrained(folder)
    finish(folder)
    print(fitted.report.table())
    say(f"saved to {folder}; train with: onerec-hf train --semantic_ids {folder}, and the same data options")


def report(argv: list[str]) -> None:
    """Quantisers side by side on the same embeddings."""
    data_args, id_args, args = parse(
        (DataArguments, SemanticIDArguments, ReportArguments), argv, "semantic-ids report"
    )
    from onerec_hf.semantic_ids import CrowdedPrefixError, compare_reports, plot_reports
    from onerec_hf.semantic_ids.quantizer import METHODS

    if unknown := [name for name in args.quantizers if name not in METHODS]:
        raise ValueError(f"--quantizers {unknown[0]}: there are {', '.join(METHODS)}")
    data = prepare_data(data_args)
    embedded, reports = embed_items(data, id_args), []
    for name in args.quantizers:
        asked = replace(id_args, quantizer=name)
        try:
            fitted = fit_catalogue(data, asked, embedded)
        except CrowdedPrefixError as error:
            say(f"{name}: {error}. Its collisions are resolved by an extra digit here.")
            fitted = fit_catalogue(data, replace(asked, on_collision="extra-digit"), embedded)
        reports.append(fitted.report)
    if args.json:
        rows = [report.as_dict() for report in reports]
        write_bytes(Path(args.json), (json.dumps(rows, indent=1) + "\n").encode())
    if args.png:
        plot_reports(reports, args.png)
    print(compare_reports(reports))
