"""What the demo raises."""

from masksam_nnunet.plans.errors import PlanError


class DemoError(PlanError):
    """The demo cannot go on; the message names the option or step, what was found, and the remedy."""
