"""Recommendation quality on public data, beside tuned baselines."""
