"""Options of a command from the command line and `--config file.yaml`, and the command as a line."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse(
    dataclasses: tuple[type, ...], argv: Sequence[str], prog: str, required: Sequence[str] = ()
) -> tuple[Any, ...]:
    """
    Parses `argv` into the dataclasses.

    Args:
        required: options without which the command fails, whatever default the dataclass has.

    Raises:
        ValueError: an unknown option (in the YAML file too), a missing one, or a value that does not fit.
    """
    from onerec_hf.cli.parser import CommandParser

    return CommandParser(dataclasses, f"onerec-hf {prog}", required).parse_command(argv)


def command_line(prog: str, argv: Sequence[str]) -> str:
    """
    The command as it is typed in a shell, for result files and messages.

    Example:
        >>> command_line("train", ["--output_dir", "my model"])
        "onerec-hf train --output_dir 'my model'"
    """
    return shlex.join(["onerec-hf", *prog.split(), *argv])
