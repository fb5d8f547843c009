"""Impressions and graded feedback: what a reward model learns from."""
