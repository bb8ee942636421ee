"""What the demo, the export and all that looks for a trained model raise."""

from masksam_nnunet.plans.errors import PlanError


class DemoError(PlanError):
    """The demo cannot go on; the message names the option or step, what was found, and the remedy."""


class ExportError(PlanError):
    """A model cannot be exported; the message names what is missing, where, and the remedy."""


class ModelError(PlanError):
    """There is no such trained model; the message names what was looked for, where, and what there is."""
