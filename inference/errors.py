"""What the demo and the export raise."""

from masksam_nnunet.plans.errors import PlanError


class DemoError(PlanError):
    """The demo cannot go on; the message names the option or step, what was found, and the remedy."""


class ExportError(PlanError):
    """A model cannot be exported; the message names what is missing, where, and the remedy."""
