"""The trainers that nnU-Net finds by name; ``nnunet_ext`` is the folder that it scans."""

# ruff: noqa: F401  __all__ takes them from here

from .masksam import MaskSAMTrainer
from .related import *  # noqa: F403  made from the methods
from .time_budget import (
    MaskSAMTrainer_budget,
    MaskSAMTrainer_lite_medsam_budget,
    MaskSAMTrainer_tiny_budget,
    nnUNetTrainer_adamw_budget,
    nnUNetTrainer_budget,
)
from .variants import (
    MaskSAMTrainer_1epoch,
    MaskSAMTrainer_5epochs,
    MaskSAMTrainer_50epochs,
    MaskSAMTrainer_100epochs,
    MaskSAMTrainer_250epochs,
    MaskSAMTrainer_500epochs,
    MaskSAMTrainer_acdc,
    MaskSAMTrainer_amos,
    MaskSAMTrainer_lite_medsam,
    MaskSAMTrainer_medsam,
    MaskSAMTrainer_mobile_sam,
    MaskSAMTrainer_synapse,
    MaskSAMTrainer_tiny,
    MaskSAMTrainer_tiny_1epoch,
    MaskSAMTrainer_tiny_5epochs,
    MaskSAMTrainer_tiny_50epochs,
    MaskSAMTrainer_vit_h,
    MaskSAMTrainer_vit_l,
)

__all__ = [name for name in globals() if "Trainer" in name]
