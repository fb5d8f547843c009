"""The parser behind every command: TrlParser, with YAML values checked like the command line's and errors of one line."""

from __future__ import annotations

import difflib
import os
from argparse import Action, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers.hf_argparser import string_to_bool
from trl.scripts.utils import TrlParser

from onerec_hf.modeling.files import UNEXPECTED, short

_MOST_VALUES = 100_000
_LARGEST = 2**53
# Options of earlier versions, and what they are called now.
RENAMED = {
    "item_embeddings": "item_head",
    "item_embedding_dropout": "item_head_dropout",
    "item_loss_weight": "item_head_loss_weight",
    "item_scores_with_codes": "item_head_codes",
}


def read_options(file: str) -> dict[str, Any]:
    """
    The options of a YAML file.

    Raises:
        ValueError: no such file, no YAML, no mapping, keys that are not strings, or aliases that expand to too many values.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            options = yaml.safe_load(stream)
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError) as error:
        raise ValueError(f"--config {file}: no YAML: {short(error, 500)}") from error
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"--config {file}: expected a YAML mapping of options, e.g. max_steps: 1000")
    waiting: list[Any] = [options]
    count = 0
    while waiting:
        value = waiting.pop()
        parts = value.values() if isinstance(value, dict) else value
        waiting.extend(part for part in parts if isinstance(part, dict | list))
        count += len(parts)
        if count > _MOST_VALUES:  # a few lines of aliases can expand beyond all memory
            raise ValueError(f"--config {file}: it expands to more than {_MOST_VALUES:,} values")
    return options


def _at_home(text: str) -> str:
    """A value that begins with the home folder: a shell expands neither `~` in a file nor after an equals sign."""
    option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else text


class CommandParser(TrlParser):
    """
    Dataclasses filled from the command line and, below it, from `--config FILE.yaml`.

    Attributes:
        given: values of the options that stand on the line or in the file, by name; other fields of the dataclasses have their defaults.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Arguments:
        ...     steps: int = 3
        >>> CommandParser((Arguments,), "onerec-hf demo").parse_command(["--steps", "5"])
        (Arguments(steps=5),)
        >>> CommandParser((Arguments,), "onerec-hf demo").parse_command(["--stesp", "5"])
        Traceback (most recent call last):
        ...
        ValueError: unknown option --stesp (did you mean --steps?); `onerec-hf demo --help` lists the options
    """

    def __init__(self, dataclass_types: Any, prog: str, required: Sequence[str] = ()):
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False)
        self.given: dict[str, Any] = {}
        self._from_file: list[str] = []
        self._nested: dict[str, Any] = {}
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self._optional = {name for name, hint in hints.items() if type(None) in get_args(hint)}
        for option in required:
            self._option_string_actions[option].required = True

    def parse_command(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """
        The dataclasses, filled.

        Raises:
            ValueError: an unknown option or YAML key, a value of the wrong type, or a file that is absent or not a YAML mapping.
        """
        argv = [part for text in argv for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
        file = None
        if "--config" in argv:
            file = next(iter(argv[argv.index("--config") + 1 :]), None)
            if file is None or not os.path.isfile(file):
                self.error("--config needs a YAML file" if file is None else f"--config {file}: no such file")
        if file is not None:
            read_options(file)
        try:
            *filled, unknown_keys, unknown_options = self.parse_args_and_config(
                argv, return_remaining_strings=True, separate_remaining_strings=True
            )
        except UNEXPECTED as error:
            if file is None:
                raise
            # An option of the wrong type breaks the first code that uses it.
            reason = short(error, 500) if isinstance(error, ValueError) else f"{type(error).__name__}: {short(error)}"
            raise ValueError(f"--config {file} with the other options: {reason}") from error
        for where, unknown in (("", unknown_options), (f"{file}: ", unknown_keys)):
            if unknown:
                name = next((text for text in unknown if text.startswith("-")), unknown[0]).split("=")[0]
                if name.removeprefix("--") in RENAMED:
                    self.error(f"{where}{name} is called --{RENAMED[name.removeprefix('--')]} now")
                close = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"{where}unknown option {short(name)}" + (f" (did you mean {close[0]}?)" if close else ""))
        return tuple(filled)

    def error(self, message: str) -> NoReturn:
        """One line: argparse would print the usage, with every option of Trainer."""
        raise ValueError(f"{message}; `{self.prog} --help` lists the options")

    def set_defaults_with_config(self, **config) -> list[str]:
        unknown = []
        for key, value in config.items():
            action = self._option_string_actions.get(f"--{key}")
            if action is None:
                unknown.append(f"--{key}")
            else:
                self._from_file += self._arguments(f"--{key}", action, value)
        return unknown

    def parse_known_args(self, args=None, namespace=None):
        args = [_at_home(each) for each in (*self._from_file, *(args or []))]
        unset = object()
        blank = Namespace(**{action.dest: unset for action in self._actions})
        values = vars(super().parse_known_args(args, blank)[0])
        self.given = self._nested | {name: value for name, value in values.items() if value is not unset}
        for name, value in self.given.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and abs(number) > _LARGEST:
                    self.error(f"argument --{name}: {short(number, 40)} is out of range, at most {_LARGEST:,}")
        return super().parse_known_args(args, namespace)

    def _arguments(self, option: str, action: Action, value: Any) -> list[str]:
        """A YAML value as on the command line."""
        if isinstance(value, list) and action.nargs == "+":
            return [option, *(self._listed(option, part) for part in value)]
        if isinstance(value, dict | list) and action.type in (int, float, string_to_bool):
            self.error(f"argument {option}: expected one value, not {short(value, 80)}")
        if value is None and action.dest not in self._optional:
            self.error(f"argument {option}: null is no value for it; leave the option out for its default")
        if value is None or isinstance(value, dict | list):  # not possible on a command line: as in TrlParser
            action.default = self._nested[action.dest] = value
            return []
        if value is False and action.type is not string_to_bool:
            value = "no"  # YAML reads `save_strategy: no` as false
        return [option, self._listed(option, value)] if action.nargs == "+" else [f"{option}={value}"]

    def _listed(self, option: str, value: Any) -> str:
        """One of the values of an option: argparse would read a value that begins with a dash as an option."""
        text = str(value)
        if text.startswith("-") and not self._negative_number_matcher.match(text):
            self.error(f"argument {option}: invalid value {short(text)!r}")
        return text
