"""`onerec-hf prepare`: a log of any size to a folder of sharded training examples, for `onerec-hf train --prepared`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onerec_hf.cli.arguments import command_line, parse
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.feature_options import check_feature_options, feature_options
from onerec_hf.workflows.settings import OutputSettings, WindowSettings

if TYPE_CHECKING:
    from onerec_hf.data.shards.features import LogFeatures


@dataclass
class PreparedFeatures:
    """Features: columns that the model reads."""

    users: str | None = field(
        default=None,
        metadata={"help": "Your users, which are read into memory: user_id and the columns of --user_features."},
    )
    items: str | None = field(
        default=None,
        metadata={"help": "Your items, which are read into memory: item_id and the columns of --item_features."},
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "auto: the model reads every column that is a feature, of --users, --items and the log, and interactions that are not positive. none (the default): items only. The four options below choose one by one, also beside auto."
        },
    )
    user_features: list[str] | None = field(
        default=None, metadata={"help": "Columns of --users that the model reads; auto guesses them."}
    )
    item_features: list[str] | None = field(
        default=None, metadata={"help": "Columns of --items that the model reads; auto guesses them."}
    )
    interaction_features: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of the log that the model reads of a history, and time; auto guesses them."},
    )
    history_feedback: str | None = field(
        default=None,
        metadata={
            "help": "Interactions of a history: positive (the default), or all, also those that are no targets."
        },
    )

    def read(self, user_column: str, item_column: str) -> LogFeatures | None:
        """
        The features of a log; None without any.

        Raises:
            ValueError: a table without features of it, or the other way round; DataError: what is wrong with a table.
        """
        from onerec_hf.data import read_items, read_users
        from onerec_hf.data.shards.features import LogFeatures

        check_feature_options(self)
        options = feature_options(self, self.users is not None, self.items is not None, everything=None)
        names = {side: options[f"{side}_features"] for side in ("user", "interaction", "item")}
        for side, table in (("user", self.users), ("item", self.items)):
            if (table is None) != (names[side] is None):
                raise ValueError(f"--{side}s goes with --{side}_features or --features auto; pass both or neither")
        feedback = options["history_feedback"]
        if not any(names.values()) and feedback == "positive":
            return None
        return LogFeatures(
            {side: value or () for side, value in names.items()},
            None if self.users is None else read_users(self.users, user_column=user_column),
            None if self.items is None else read_items(self.items, item_column=item_column),
            None if feedback is None else feedback == "all",
        )


@dataclass
class PrepareOptions(OutputSettings):
    """The log and the layout of the output folder."""

    interactions: str | None = field(
        default=None,
        metadata={
            "help": "The log: a file such as --interactions of train takes, a folder of them, or a quoted pattern."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to make."})
    train_on: str = field(
        default="windows",
        metadata={
            "help": "windows (one history per session) or prefixes (one history for all its sessions; for --encoder_is_causal)."
        },
    )
    num_shards: int = field(
        default=64, metadata={"help": "Training files; best a multiple of ranks times data loader workers."}
    )
    rows_per_bucket: int = field(
        default=2_000_000,
        metadata={"help": "Approximate number of log rows in memory at a time."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the training examples."})
    engine: str = field(
        default="polars",
        metadata={
            "help": "polars (this machine) or ray: a Ray cluster (RAY_ADDRESS) whose machines share these folders; same files."
        },
    )


def main(argv: list[str]) -> None:
    kinds = (PrepareOptions, WindowSettings, PreparedFeatures)
    args, windows, features = parse(kinds, argv, "prepare", required=["--interactions", "--output_dir"])
    from onerec_hf.data import ExampleSettings, PositiveFeedback, prepare_log

    settings = ExampleSettings(
        windows.min_item_interactions,
        windows.session_length,
        windows.max_history,
        windows.stride,
        args.train_on,
    )
    manifest = prepare_log(
        args.interactions,
        args.output_dir,
        user_column=windows.user_column,
        item_column=windows.item_column,
        timestamp_column=windows.timestamp_column,
        column_names=windows.column_names,
        positive=None if windows.positive is None else PositiveFeedback.parse(windows.positive),
        settings=settings,
        num_shards=args.num_shards,
        rows_per_bucket=args.rows_per_bucket,
        seed=args.seed,
        overwrite=args.overwrite,
        engine=args.engine,
        features=(read := features.read(windows.user_column, windows.item_column)),
    )
    for line in [] if read is None else read.said:
        say(line)
    counts = manifest["counts"]
    width = max(map(len, counts))
    print("\n".join(f"{name.replace('_', ' '):<{width}}  {count:>15,}" for name, count in counts.items()))
    hint = command_line("train", ["--prepared", args.output_dir, "--output_dir"])
    say(f"{manifest['protocol']}\nsaved to {args.output_dir}; train with: {hint} ...")
