"""Semantic IDs in other projects' files."""
