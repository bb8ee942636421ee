"""What packaging for a challenge raises."""

from masksam_nnunet.plans.errors import PlanError


class SubmissionError(PlanError):
    """Predictions cannot be packaged for a challenge; the message names every defect, or the option, and the remedy."""
