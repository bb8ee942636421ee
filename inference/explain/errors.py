"""What looking inside raises."""

from masksam_nnunet.plans.errors import PlanError


class ExplainError(PlanError):
    """A case cannot be explained; the message names the option or file, what was found, and the remedy."""
