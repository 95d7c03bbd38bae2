"""Probabilistic federated prompt tuning and its variants."""
