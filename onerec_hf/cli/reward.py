"""`onerec-hf reward`: trains a session reward model from impressions with feedback, and evaluates it with baselines on a later period."""

from __future__ import annotations

from onerec_hf.cli.arguments import command_line, parse
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.results import reward_table
from onerec_hf.workflows.reward_data import RewardDataSettings
from onerec_hf.workflows.reward_training import METRICS, RewardModelSettings, train_reward
from onerec_hf.workflows.settings import OutputSettings


def main(argv: list[str]) -> None:
    from onerec_hf.trainers import RewardTrainingArguments

    kinds = (RewardDataSettings, RewardModelSettings, OutputSettings, RewardTrainingArguments)
    data, *settings = parse(kinds, argv, "reward", required=["--output_dir"])
    result = train_reward(data, *settings, command=command_line("reward", argv))
    if is_first():
        print(reward_table(result.rows, result.model.config.objectives or [], list(METRICS)))
