"""`onerec-hf align`: aligns a trained generator with reward models or given preferences, and prints results before and after."""

from __future__ import annotations

from onerec_hf.cli.arguments import command_line, parse_given
from onerec_hf.workflows.alignment import AlignSettings, align
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.results import before_and_after_table
from onerec_hf.workflows.settings import DataSettings
from onerec_hf.workflows.sharding import ShardingSettings


def main(argv: list[str]) -> None:
    from onerec_hf.trainers import OneRecDPOConfig

    kinds = (AlignSettings, DataSettings, ShardingSettings, OneRecDPOConfig)
    given = parse_given(kinds, argv, "align", required=["--output_dir"])
    result = align(**given, command=command_line("align", argv))
    if is_first() and "onerec/recall@10" in result.metrics:
        print(before_and_after_table(result.rows))
        print_rewards(result.metrics)


def print_rewards(metrics: dict[str, float]) -> None:
    """The mean reward of generated sessions before and after, a line per kind of reward model."""
    for name, who in (
        ("reward", "the reward that picked the pairs"),
        ("heldout_reward", "a held-out judge"),
    ):
        if f"{name}/before" in metrics:
            before, after = (metrics[f"{name}/{when}"] for when in ("before", "after"))
            print(f"mean reward of a session by {who}: {before:.4f} -> {after:.4f}")
