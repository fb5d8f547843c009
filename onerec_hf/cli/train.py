"""`onerec-hf train`: interactions to a saved artefact (model, processor, catalogue, card) and its results."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.cli.arguments import command_line, parse_given
from onerec_hf.cli.help import asks_help, groups_of, help_text, trainer_groups
from onerec_hf.workflows.auto import choices_table
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.results import ranking_table
from onerec_hf.workflows.settings import DataSettings, ModelSettings, SemanticIDSettings
from onerec_hf.workflows.sharding import ShardingSettings
from onerec_hf.workflows.training import TrainSettings, chosen_settings, train


@dataclass
class TrainOptions:
    """What the command does."""

    dry_run: bool = field(
        default=False, metadata={"help": "Print the settings and their reasons, and stop before anything is written."}
    )


ABOUT = """
Trains a generator on interactions, ranks the test items beside the baselines, and saves model, catalogue, results and card. Needs --interactions (or
--dataset, --prepared) only: with --preset auto every option that is not passed is chosen from the data, and --dry_run prints the choices with
their reasons. The defaults below are those of --preset paper.
"""
KINDS = (DataSettings, SemanticIDSettings, ModelSettings, ShardingSettings, TrainSettings, TrainOptions)


def main(argv: list[str]) -> None:
    if asks_help(argv):
        groups = [*groups_of(KINDS), *trainer_groups()]
        print(help_text("train", groups, " ".join(ABOUT.split()), everything="--help_all" in argv))
        return
    from onerec_hf.trainers import OneRecTrainingArguments

    given = parse_given((*KINDS, OneRecTrainingArguments), argv, "train")
    if given.pop("dry_run", False):
        choices = chosen_settings(**given)
        if is_first() and choices:
            print(choices_table(choices))
        return
    result = train(**given, command=command_line("train", argv))
    if is_first():
        print(ranking_table(result.rows))
        if result.verdict is not None:
            print(f"\n{result.verdict}")
