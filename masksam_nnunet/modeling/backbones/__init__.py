"""The image encoders, each declared once."""
