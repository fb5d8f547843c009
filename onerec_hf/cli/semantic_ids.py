"""
`onerec-hf semantic-ids fit`: items to semantic IDs: a processor with its catalogue, the codebooks and a report.
`onerec-hf semantic-ids report`: quantizers side by side on the same items, as a table and a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from onerec_hf.cli.arguments import command_line, parse
from onerec_hf.workflows.artefact import write_bytes
from onerec_hf.workflows.distributed import is_first, say
from onerec_hf.workflows.semantic_ids import FitSettings, compare_quantizers, fit_semantic_ids
from onerec_hf.workflows.settings import DataSettings, SemanticIDSettings


@dataclass
class ReportOptions:
    """The quantizers to compare and the output files."""

    quantizers: list[str] = field(
        default_factory=lambda: ["balanced", "kmeans", "rq-vae"], metadata={"help": "Quantizers to compare."}
    )
    json: str | None = field(default=None, metadata={"help": "File for the reports as JSON."})
    png: str | None = field(default=None, metadata={"help": "PNG file for the plots."})


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        argv = ["fit", *argv]
    if argv[:1] not in (["fit"], ["report"]):
        raise ValueError(
            "choose a subcommand: onerec-hf semantic-ids fit --help, or onerec-hf semantic-ids report --help"
        )
    (fit if argv[0] == "fit" else report)(argv[1:])


def fit(argv: list[str]) -> None:
    """Semantic IDs by one quantizer, into a folder."""
    data, ids, output = parse((DataSettings, SemanticIDSettings, FitSettings), argv, "semantic-ids fit")
    fitted = fit_semantic_ids(data, ids, output, command=command_line("semantic-ids fit", argv))
    if not is_first():
        return
    print(fitted.report.table())
    folder = output.output_dir
    say(f"saved to {folder}; train with: onerec-hf train --semantic_ids {folder}, and the same data options")


def report(argv: list[str]) -> None:
    """Quantizers side by side on the same embeddings."""
    data, ids, options = parse((DataSettings, SemanticIDSettings, ReportOptions), argv, "semantic-ids report")
    from onerec_hf.semantic_ids import compare_reports, plot_reports

    reports = compare_quantizers(data, ids, options.quantizers)
    if options.json:
        rows = [each.as_dict() for each in reports]
        write_bytes(Path(options.json), (json.dumps(rows, indent=1) + "\n").encode())
    if options.png:
        plot_reports(reports, options.png)
    print(compare_reports(reports))
