"""A trained model as a Grand Challenge algorithm container."""
