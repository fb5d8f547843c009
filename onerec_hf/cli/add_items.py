"""`onerec-hf add-items`: new items for a saved model, without training."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.cli.arguments import parse
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.new_items import AddItemsSettings, add_items


@dataclass
class AddItemsOptions:
    """The tables."""

    items: str | None = field(
        default=None,
        metadata={
            "help": "The new items, with the columns that the model was trained with; known ones may be among them."
        },
    )
    embeddings: str | None = field(
        default=None, metadata={"help": ".npy of item embeddings, one row per row of --items."}
    )
    interactions: str | None = field(
        default=None,
        metadata={"help": "A log in which the new items occur: items that are consumed together get similar codes."},
    )


def main(argv: list[str]) -> None:
    settings, tables = parse((AddItemsSettings, AddItemsOptions), argv, "add-items", required=("--model",))
    result = add_items(tables.items, settings, embeddings=tables.embeddings, interactions=tables.interactions)
    if result.left_out:
        say(
            f"{len(result.left_out):,} new items have no known word and no interactions with items of the model, and were left out, e.g. "
            f"{result.left_out[0]!r}"
        )
    print(f"{result.folder}: {len(result.added):,} new items were added; {result.known:,} were known.")
