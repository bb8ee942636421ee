"""Predict cases with one model or several."""
