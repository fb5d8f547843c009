"""Trainers, each beside its config."""
