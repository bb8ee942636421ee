"""The ``masksam`` command, one module for each group of commands."""
