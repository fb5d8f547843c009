"""Options of a command from the command line and `--config file.yaml`, and the command as a line."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

from onerec_hf.cli.help import asks_help, groups_of, help_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onerec_hf.data.item_fields import ItemFields
    from onerec_hf.modeling.catalogue import ItemCatalogue


def parse(
    dataclasses: tuple[type, ...], argv: Sequence[str], prog: str, required: Sequence[str] = ()
) -> tuple[Any, ...]:
    """
    Parses `argv` into the dataclasses.

    Args:
        required: required options, whatever default the dataclass has.

    Raises:
        ValueError: an unknown option (in the YAML file too), a missing one, or a value that does not fit.
    """
    print_help(dataclasses, argv, prog, required)
    from onerec_hf.cli.parser import CommandParser

    return CommandParser(dataclasses, f"onerec-hf {prog}", required).parse_command(argv)


def parse_given(
    dataclasses: tuple[type, ...], argv: Sequence[str], prog: str, required: Sequence[str] = ()
) -> dict[str, Any]:
    """
    The options that stand in `argv` or in its `--config` file, by name, after all of them have been checked by the dataclasses. Options that
    are not there are left to the workflow, which chooses them.

    Raises:
        ValueError: as [`parse`].

    Example:
        >>> from onerec_hf.workflows import ModelSettings
        >>> parse_given((ModelSettings,), ["--hidden_size", "64", "--no_cross_attention_rope"], "train")
        {'hidden_size': 64, 'cross_attention_rope': False}
    """
    print_help(dataclasses, argv, prog, required)
    from onerec_hf.cli.parser import CommandParser

    parser = CommandParser(dataclasses, f"onerec-hf {prog}", required)
    parser.parse_command(argv)
    return parser.given


def print_help(dataclasses: tuple[type, ...], argv: Sequence[str], prog: str, required: Sequence[str]) -> None:
    """Prints the options and exits, if they ask for it; the parser's import takes seconds."""
    if asks_help(argv):
        print(help_text(prog, groups_of(dataclasses), required=required, everything="--help_all" in argv))
        raise SystemExit(0)


def options_of(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """
    The given options that are fields of a dataclass.

    Example:
        >>> from onerec_hf.workflows import DataSettings
        >>> options_of(DataSettings, {"hidden_size": 64, "stride": 2})
        {'stride': 2}
    """
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in given.items() if name in names}


def command_line(prog: str, argv: Sequence[str]) -> str:
    """
    The command as it is typed in a shell, for result files and messages.

    Example:
        >>> command_line("train", ["--output_dir", "my model"])
        "onerec-hf train --output_dir 'my model'"
    """
    return shlex.join(["onerec-hf", *prog.split(), *argv])


@dataclass
class ShownItemArguments:
    """Item fields in answers, in addition to the id."""

    items: str | None = field(
        default=None,
        metadata={"help": "Your items: item ids and the columns to show, in place of those saved with the model."},
    )
    item_column: str | None = field(
        default=None, metadata={"help": "Name of the item column of --items; that of the model's training by default."}
    )
    item_column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of --items without a header, in order."}
    )
    show_fields: bool = field(default=True, metadata={"help": "Show titles and other columns of the items."})

    def load(self, repo: str | os.PathLike, catalogue: ItemCatalogue) -> ItemFields | None:
        """
        Fields by item id; None without a table.

        Raises:
            ValueError: a table that is damaged or belongs to another catalogue.
        """
        import pandas as pd

        from onerec_hf.data import canonical_ids, read_items
        from onerec_hf.data.columns import about
        from onerec_hf.data.item_fields import ItemFields
        from onerec_hf.modeling.items_file import saved_items
        from onerec_hf.workflows.data_options import saved_data_options

        if not self.show_fields:
            return None
        if self.items is None:
            return cast("ItemFields | None", saved_items(repo, catalogue))  # the package is here
        column = self.item_column or saved_data_options(repo).get("item_column", "item_id")
        with about(self.items):
            of_model = canonical_ids(pd.Series(catalogue.ids([0])), "item_id")
            items = read_items(self.items, item_column=column, column_names=self.item_column_names).with_ids_like(
                of_model
            )
            return ItemFields(items, catalogue)
