"""`onerec-hf align`: aligns a trained generator with reward models or given preferences, and prints results before and after."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from onerec_hf.cli import arguments
from onerec_hf.cli.arguments import command_line, parse_given
from onerec_hf.workflows.alignment import AlignSettings, align, config_of
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.results import before_and_after_table
from onerec_hf.workflows.settings import DataSettings
from onerec_hf.workflows.sharding import ShardingSettings

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: list[str]) -> None:
    method = method_in(argv)
    kinds, required = (AlignSettings, DataSettings, ShardingSettings, config_of(method)), ["--output_dir"]
    if method == "dpo":
        arguments.print_help((*kinds, config_of("grpo")), argv, "align", required)  # all methods' options
    given = parse_given(kinds, argv, "align", required)
    result = align(**given, command=command_line("align", argv))
    if is_first() and "onerec/recall@10" in result.metrics:
        print(before_and_after_table(result.rows))
        print_rewards(result.metrics)


def method_in(argv: Sequence[str]) -> str:
    """
    The method that stands in `argv` or in its `--config` file; the other options depend on it.

    Example:
        >>> method_in(["--method", "ecpo"]), method_in(["--method=gbpo"]), method_in([])
        ('ecpo', 'gbpo', 'dpo')
    """
    values = {
        name: next(iter(argv[place + 1 :]), "") if not equals else value
        for place, text in enumerate(argv)
        for name, equals, value in [text.partition("=")]
        if name in ("--method", "--config")
    }
    if "--method" in values:
        return values["--method"]
    if os.path.isfile(values.get("--config", "")):
        from onerec_hf.cli.parser import read_options

        return str(read_options(values["--config"]).get("method", "dpo"))
    return "dpo"


def print_rewards(metrics: dict[str, float]) -> None:
    """The mean reward of generated sessions before and after, a line per kind of reward model."""
    for name, who in (
        ("reward", "the optimised reward"),
        ("heldout_reward", "a held-out judge"),
    ):
        if f"{name}/before" in metrics:
            before, after = (metrics[f"{name}/{when}"] for when in ("before", "after"))
            print(f"mean reward of a session by {who}: {before:.4f} -> {after:.4f}")
