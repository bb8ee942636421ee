"""What portable models raise."""

from masksam_nnunet.plans.errors import PlanError


class PortableError(PlanError):
    """A portable model cannot be written, read or trusted; the message names the file, what is wrong, the remedy."""
