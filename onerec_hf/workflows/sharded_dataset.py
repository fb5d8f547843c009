"""`--prepared FOLDER`: what `onerec-hf prepare` wrote, in place of a table that is read into memory."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from onerec_hf.cli.arguments import DataArguments
from onerec_hf.data.shards.read import PreparedFolder
from onerec_hf.workflows.steps import PreparedData, say

if TYPE_CHECKING:
    import datasets

    from onerec_hf.data import ExampleStream, UserSequences

# What the folder has decided.
_FIXED = ("min_item_interactions", "session_length", "max_history", "stride", "positive")


class FolderSplit:
    """A prepared folder with the parts of a [`~onerec_hf.data.Split`]; training examples are a stream."""

    def __init__(self, folder: PreparedFolder, eval_users: int | None):
        self.folder, self.eval_users = folder, eval_users
        self.train: ExampleStream = folder.train()

    @cached_property
    def validation(self) -> datasets.Dataset:
        return self.folder.held_out("validation", self.eval_users)

    @cached_property
    def test(self) -> datasets.Dataset:
        return self.folder.held_out("test", self.eval_users)

    @property
    def train_sequences(self) -> UserSequences:
        return self.folder.train_sequences


class FolderData(PreparedData):
    """A prepared folder as the commands take their data; sequences are read when somebody learns from them."""

    def counts(self) -> dict[str, int]:
        split: Any = self.split
        counts = split.folder.counts
        return {
            "interactions": counts["rows"],
            "of them kept": counts["kept"],
            "users": counts["users"],
            "items": counts["items"],
            "training examples": counts["train"],
            "validation examples": counts["validation"],
            "test examples": counts["test"],
        }


def folder_data(args: DataArguments) -> FolderData:
    """
    The data of `--prepared`. What the folder has decided (`session_length`, `max_history`, ...) is set in `args`.

    Raises:
        ValueError: no such folder, a damaged one, or options that it contradicts.
    """
    from onerec_hf.data import RecommendationData, read_items
    from onerec_hf.data.columns import about
    from onerec_hf.data.sources import with_text

    assert args.prepared is not None
    if args.dataset is not None or args.interactions is not None:
        raise ValueError("give --prepared, --interactions or --dataset; one of them")
    if args.eval_users is not None and args.eval_users < 1:
        raise ValueError(f"--eval_users must be at least 1; got {args.eval_users}")
    folder = PreparedFolder(args.prepared)
    defaults = {field.name: field.default for field in fields(DataArguments)}
    for name in _FIXED:
        given, decided = getattr(args, name), folder.settings[name]
        if name != "positive":
            setattr(args, name, decided)
        if given not in (defaults[name], decided):
            raise ValueError(
                f"--{name} {given if isinstance(given, int) else ' '.join(given)}: {args.prepared} was prepared with {decided or 'none'}; leave "
                "the option out, or prepare the log again"
            )
    items = None
    if args.items is not None:
        items = read_items(args.items, item_column=args.item_column, embeddings=args.embeddings)
        with about(args.items):
            items.select(folder.item_ids)  # raises where an item has no row
            items = with_text(items)
    elif args.embeddings is not None:
        raise ValueError("--embeddings goes with --items; give both or neither")
    log = folder.manifest["source"]
    description = f"Read from {log[0]}" + (f" and {len(log) - 1:,} more files." if len(log) > 1 else ".")
    source = RecommendationData(folder.path.resolve().name, _no_interactions(), items, description)
    say(
        f"{args.prepared}: {folder.counts['rows']:,} interactions; {folder.counts['kept']:,} of them, by {folder.counts['users']:,} users on "
        f"{folder.counts['items']:,} items, are kept, in {len(folder.train_files):,} shards. {folder.protocol}"
    )
    split: Any = FolderSplit(folder, args.eval_users)
    nowhere: Any = None  # sequences of whole users are not in the folder, and only `counts` would ask
    return FolderData(source, nowhere, split, folder.item_ids, folder.protocol)


def _no_interactions():
    import pandas as pd

    return pd.DataFrame({"user_id": [], "item_id": [], "timestamp": []})
