"""Classifiers on top of the features."""
