"""Predictions packaged as challenges accept them."""
