"""Federated prompt tuning of a frozen Vision Transformer, simulated."""

__version__ = "0.1.0"
