"""Mask classification: targets, matching and the training loss."""
