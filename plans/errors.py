"""What the commands that prepare a dataset raise."""


class PlanError(RuntimeError):
    """Planning, converting or splitting cannot go on; the message names the option, what was found, and the remedy."""
