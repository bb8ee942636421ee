"""What nnU-Net imports when it scans this folder: the trainers of the installed package, not second copies of them."""

from masksam_nnunet.trainers import *  # noqa: F403
from masksam_nnunet.trainers import __all__ as __all__
