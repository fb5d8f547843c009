"""`onerec-hf semantic-ids fit`: items to semantic IDs: a processor with its catalogue, the codebooks and a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from onerec_hf.cli.arguments import DataArguments, OutputArguments, SemanticIDArguments, parse
from onerec_hf.cli.steps import claim_folder, fit_catalogue, prepare_data, say
from onerec_hf.cli.train import CODEBOOKS_NAME


@dataclass
class FitArguments(OutputArguments):
    """Where the semantic IDs go."""

    output_dir: str = field(
        default="semantic-ids", metadata={"help": "Folder for processor, catalogue, codebooks and report."}
    )


def main(argv: list[str]) -> None:
    if not argv or argv[0] != "fit":
        raise ValueError("say what to do: onerec-hf semantic-ids fit --help")
    data_args, id_args, args = parse((DataArguments, SemanticIDArguments, FitArguments), argv[1:], "semantic-ids fit")
    folder = claim_folder(args.output_dir, args.overwrite)
    fitted = fit_catalogue(prepare_data(data_args), id_args)

    from onerec_hf.modeling.processing_onerec import OneRecProcessor

    OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history).save_pretrained(folder)
    fitted.quantizer.save(folder / CODEBOOKS_NAME)
    (folder / "semantic_ids.json").write_text(json.dumps(fitted.report.as_dict(), indent=1) + "\n")
    print(fitted.report.table())
    say(f"saved to {folder}; train with: onerec-hf train --semantic_ids {folder}")
