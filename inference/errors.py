"""What the demo, the export and all that looks for a trained model raise."""

from masksam_nnunet.plans.errors import PlanError


class DemoError(PlanError):
    """The demo cannot go on; the message names the option or step, what was found, and the remedy."""


class ExportError(PlanError):
    """A model cannot be exported; the message names what is missing, where, and the remedy."""


class ModelError(PlanError):
    """There is no such trained model; the message names what was looked for, where, and what there is."""


class PredictError(PlanError):
    """Nothing can be predicted, or no more; the message names the option or file, what was found, and the remedy."""


class CaseError(RuntimeError):
    """One case cannot be predicted; the message names the file, what is wrong with it, and the remedy."""


def in_short(error: BaseException) -> str:
    """What a library's error says, in one line with its kind."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[-300:]}" if words else type(error).__name__
