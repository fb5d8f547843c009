"""
`onerec-hf prepare` on a Ray cluster: the same examples from the same Parquet log, made by all workers of the cluster.

    pip install "onerec-hf[ray]"
    python examples/prepare_with_ray.py --interactions 'logs/*.parquet' --output_dir prepared --positive 'like>=1'

There is one task per file of the log, then one per bucket of users, with the functions of `onerec-hf prepare`. The output folder contains
`split=train`, `split=validation` and `split=test`, folders of Parquet files with `user_id`, `history` and `session`;
`ExampleStream(glob("prepared/split=train/*.parquet"))` trains on them. On a cluster all paths must be readable by all workers.
"""

from __future__ import annotations

import argparse
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from onerec_hf.data import ExampleSettings, PositiveFeedback
from onerec_hf.data.shards.buckets import BucketExamples, tidy
from onerec_hf.data.shards.logs import Checks, Log, find_log_files

TYPED = {"user": False, "item": False, "time": False}  # Parquet has column types


def prepare_with_ray(
    interactions: str, output_dir: str, positive: PositiveFeedback, settings: ExampleSettings, buckets: int = 64
) -> None:
    """Writes the examples; `ray.init` has been called, or starts Ray here."""
    files = find_log_files(interactions)
    sizes = [pq.read_metadata(path).num_rows for path in files]
    parts = [{"file": str(path), "first_row": sum(sizes[:i])} for i, path in enumerate(files)]

    def positive_rows(part: Any) -> pa.Table:
        [file], [first_row] = part["file"], part["first_row"]
        log, checks = Log(find_log_files(file), positive=positive, first_row=int(first_row)), Checks()
        # Which columns may number the rows differs between files; `prepare` looks at all of them.
        names = ["user", "item", "time", "rest", "row", "others", "bucket"]
        frames = [batch.select(names) for batch in log.batches(checks, buckets)]
        if checks.bad:
            log.require_good(checks)
        return pl.concat(frames).to_arrow(compat_level=pl.CompatLevel.oldest())

    def in_order(bucket: pa.Table) -> pa.Table:
        rows: Any = pl.from_arrow(bucket)
        whole = tidy(rows, TYPED).select(pl.lit(rows["bucket"][0]).alias("bucket"), pl.all().implode())
        return whole.to_arrow(
            compat_level=pl.CompatLevel.oldest()
        )  # a row per bucket: nothing has to be gathered again

    def rows_of(bucket: pa.Table) -> Any:
        whole: Any = pl.from_arrow(bucket)
        return whole.drop("bucket").explode(pl.all())

    def count(bucket: pa.Table) -> pa.Table:
        return rows_of(bucket).group_by("item").len("rows").to_arrow(compat_level=pl.CompatLevel.oldest())

    def examples(bucket: pa.Table) -> pa.Table:
        rows = rows_of(bucket)
        kept = pl.DataFrame({"item": ray.get(frequent)}, schema={"item": rows.schema["item"]})
        rows = rows.join(kept, on="item", how="semi", maintain_order="left")
        cut = BucketExamples(rows, settings, seed=bucket["bucket"][0].as_py())
        tables = {"train": cut.train(slice(None)), "validation": cut.validation(), "test": cut.test()}
        return pa.concat_tables(
            table.append_column("split", pa.array([name] * table.num_rows, pa.string()))
            for name, table in tables.items()
        )

    rows = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(positive_rows, batch_size=1)
    whole = rows.groupby("bucket", num_partitions=buckets).map_groups(in_order, batch_format="pyarrow").materialize()
    items: Any = (
        whole.map_batches(count, batch_size=1, batch_format="pyarrow").to_pandas().groupby("item")["rows"].sum()
    )
    frequent = ray.put(items[items >= settings.min_item_interactions].index.tolist())
    whole.map_batches(examples, batch_size=1, batch_format="pyarrow").write_parquet(
        output_dir, partition_cols=["split"]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--interactions", required=True, help="a folder or a pattern of Parquet files")
    arguments.add_argument("--output_dir", required=True)
    arguments.add_argument("--positive", nargs="+", default=[], help="what counts as positive, e.g. 'like>=1'")
    arguments.add_argument("--min_item_interactions", type=int, default=5)
    arguments.add_argument("--session_length", type=int, default=5)
    arguments.add_argument("--max_history", type=int, default=50)
    arguments.add_argument("--stride", type=int, default=1)
    args = arguments.parse_args()
    settings = ExampleSettings(args.min_item_interactions, args.session_length, args.max_history, args.stride)
    prepare_with_ray(args.interactions, args.output_dir, PositiveFeedback.parse(args.positive), settings)


if __name__ == "__main__":
    main()
