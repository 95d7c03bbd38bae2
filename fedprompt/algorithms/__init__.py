"""Federated methods: one file per published method."""
