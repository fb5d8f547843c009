"""`onerec-hf update`: new interactions counted into a saved model, without training."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.cli.arguments import options_of, parse_given
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.updating import UpdateSettings, update


@dataclass
class UpdateOptions:
    """The tables."""

    interactions: str | None = field(
        default=None,
        metadata={"help": "The new rows: .csv, .tsv, .parquet, .jsonl or .inter with user, item and timestamp."},
    )
    history: str | None = field(
        default=None,
        metadata={"help": "Earlier rows of the same users: pairs of an earlier and a new item count too."},
    )


def main(argv: list[str]) -> None:
    given = parse_given((UpdateSettings, UpdateOptions), argv, "update", required=("--model", "--interactions"))
    tables = UpdateOptions(**options_of(UpdateOptions, given))
    assert tables.interactions is not None
    result = update(tables.interactions, history=tables.history, **options_of(UpdateSettings, given))
    for note in result.notes:
        say(note)
    counts = result.counts
    print(
        f"{result.folder}: {counts['interactions']:,} interactions and {counts['pairs']:,} pairs of {counts['positive']:,} "
        f"positive rows ({counts['rows']:,} in the table) were added."
    )
