"""What every HTML report is made of: figures, numbers, templates."""
