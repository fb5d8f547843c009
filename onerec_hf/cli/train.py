"""`onerec-hf train`: interactions to a saved artefact (model, processor, catalogue, card) and its results."""

from __future__ import annotations

from onerec_hf.cli.arguments import command_line, parse
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.results import ranking_table
from onerec_hf.workflows.settings import DataSettings, ModelSettings, SemanticIDSettings
from onerec_hf.workflows.sharding import ShardingSettings
from onerec_hf.workflows.training import TrainSettings, train


def main(argv: list[str]) -> None:
    from onerec_hf.trainers import OneRecTrainingArguments

    kinds = (
        DataSettings,
        SemanticIDSettings,
        ModelSettings,
        ShardingSettings,
        TrainSettings,
        OneRecTrainingArguments,
    )
    data, *settings = parse(kinds, argv, "train", required=["--output_dir"])
    result = train(data, *settings, command=command_line("train", argv))
    if is_first():
        print(ranking_table(result.rows))
