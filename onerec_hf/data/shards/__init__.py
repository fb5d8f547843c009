"""Interactions beyond memory: written by `prepare_log` as sharded Parquet, read and streamed back."""
