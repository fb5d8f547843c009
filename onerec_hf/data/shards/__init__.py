"""Data larger than memory: `prepare_log` writes sharded Parquet, which is read and streamed."""
