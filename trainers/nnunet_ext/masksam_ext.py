"""What nnU-Net imports when it scans this folder: the trainers of the installed package, not second copies of them."""

from .. import *  # noqa: F403
from .. import __all__ as __all__
