"""Frozen pretrained models, cut into the pieces that prompt tuning needs."""
