"""Damaged files, killed processes, fuzzed requests."""
