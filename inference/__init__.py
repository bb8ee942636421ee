"""Prediction, scores, explanations, exported models, submissions, the container, and what reports share."""
