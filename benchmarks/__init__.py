"""Benchmarks: each room measures one thing, each script prints a table and writes JSON."""
