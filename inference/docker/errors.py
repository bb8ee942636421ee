"""What ends the container, and its exit codes: 0 done, 1 cases failed, 2 an option, and those of the classes here."""

from masksam_nnunet.errors import PredictError

SOME_CASES_FAILED = 1


class ContainerError(PredictError):
    """Nothing can be predicted; the message names what was found, where, and the remedy."""

    exit_code: int


class OptionError(ContainerError):
    """An option or the model's container.json."""

    exit_code = 2


class InputError(ContainerError):
    """The input as a whole: missing, unreadable, or not the model's channels."""

    exit_code = 3


class ModelFolderError(ContainerError):
    """The model: missing, damaged, incomplete."""

    exit_code = 4


class OutputError(ContainerError):
    """The output or the scratch folder: not writable, or full."""

    exit_code = 5
