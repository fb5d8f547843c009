"""`onerec-hf semantic-ids fit`: items to semantic IDs: a processor with its catalogue, the codebooks and a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from onerec_hf.cli.arguments import DataArguments, OutputArguments, SemanticIDArguments, parse
from onerec_hf.cli.steps import (
    CODEBOOKS_NAME,
    check_folder,
    claim_folder,
    fit_catalogue,
    prepare_data,
    say,
    write_bytes,
)


@dataclass
class FitArguments(OutputArguments):
    """Where the semantic IDs go."""

    output_dir: str = field(
        default="semantic-ids", metadata={"help": "Folder for processor, catalogue, codebooks and report."}
    )


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        argv = ["fit", *argv]
    if argv[:1] != ["fit"]:
        raise ValueError("say what to do: onerec-hf semantic-ids fit --help")
    data_args, id_args, args = parse((DataArguments, SemanticIDArguments, FitArguments), argv[1:], "semantic-ids fit")
    if id_args.semantic_ids is not None:
        raise ValueError("--semantic_ids is for `onerec-hf train`: fit makes new ones, into --output_dir")
    folder = check_folder(args.output_dir, args.overwrite)
    fitted = fit_catalogue(prepare_data(data_args), id_args)

    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    claim_folder(folder)
    OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history).save_pretrained(folder)
    fitted.quantizer.save(folder / CODEBOOKS_NAME)
    write_bytes(folder / "semantic_ids.json", (json.dumps(fitted.report.as_dict(), indent=1) + "\n").encode())
    print(fitted.report.table())
    say(f"saved to {folder}; train with: onerec-hf train --semantic_ids {folder}, and the same data options")
