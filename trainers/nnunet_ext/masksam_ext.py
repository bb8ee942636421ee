"""The module that nnU-Net imports when it scans this folder: it holds the trainers of the installed package.

Its imports are absolute, since nnU-Net imports it without its package.
"""

from masksam_nnunet.trainers import *  # noqa: F403
from masksam_nnunet.trainers import __all__ as __all__
