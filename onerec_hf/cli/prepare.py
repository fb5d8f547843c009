"""`onerec-hf prepare`: a log of any size to a folder of sharded training examples, for `onerec-hf train --prepared`."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.cli.arguments import command_line, parse
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import FEATURE_OPTIONS, OutputSettings, WindowSettings


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


def main(argv: list[str]) -> None:
    for option in (word.partition("=")[0] for word in argv):
        if option.removeprefix("--") in ("users", *FEATURE_OPTIONS):
            raise ValueError(
                f"{option}: a prepared folder holds no features; train with --interactions, which reads the table into memory"
            )
    args, windows = parse(
        (PrepareOptions, WindowSettings), argv, "prepare", required=["--interactions", "--output_dir"]
    )
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
    )
    counts = manifest["counts"]
    width = max(map(len, counts))
    print("\n".join(f"{name.replace('_', ' '):<{width}}  {count:>15,}" for name, count in counts.items()))
    hint = command_line("train", ["--prepared", args.output_dir, "--output_dir"])
    say(f"{manifest['protocol']}\nsaved to {args.output_dir}; train with: {hint} ...")
