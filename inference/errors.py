"""What the demo raises."""


class DemoError(RuntimeError):
    """The demo cannot go on; the message names the option or step, what was found, and the remedy."""
