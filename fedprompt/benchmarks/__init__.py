"""Measured comparisons that anyone can run with ``fedprompt bench NAME``."""
