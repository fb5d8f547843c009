"""Impressions with feedback: training data of the reward model."""
