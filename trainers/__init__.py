"""The trainers that nnU-Net finds by name; ``nnunet_ext`` is the folder that it scans."""

from .published import MaskSAMTrainer_acdc, MaskSAMTrainer_amos, MaskSAMTrainer_synapse
from .time_budget import MaskSAMTrainer_vit_t_budget, nnUNetTrainer_budget
from .trainer import MaskSAMTrainer
from .variants import (
    MaskSAMTrainer_1epoch,
    MaskSAMTrainer_5epochs,
    MaskSAMTrainer_50epochs,
    MaskSAMTrainer_100epochs,
    MaskSAMTrainer_250epochs,
    MaskSAMTrainer_500epochs,
    MaskSAMTrainer_vit_h,
    MaskSAMTrainer_vit_l,
    MaskSAMTrainer_vit_t,
    MaskSAMTrainer_vit_t_1epoch,
    MaskSAMTrainer_vit_t_5epochs,
    MaskSAMTrainer_vit_t_50epochs,
)

__all__ = [
    "MaskSAMTrainer",
    "MaskSAMTrainer_1epoch",
    "MaskSAMTrainer_5epochs",
    "MaskSAMTrainer_50epochs",
    "MaskSAMTrainer_100epochs",
    "MaskSAMTrainer_250epochs",
    "MaskSAMTrainer_500epochs",
    "MaskSAMTrainer_acdc",
    "MaskSAMTrainer_amos",
    "MaskSAMTrainer_synapse",
    "MaskSAMTrainer_vit_h",
    "MaskSAMTrainer_vit_l",
    "MaskSAMTrainer_vit_t",
    "MaskSAMTrainer_vit_t_1epoch",
    "MaskSAMTrainer_vit_t_5epochs",
    "MaskSAMTrainer_vit_t_50epochs",
    "MaskSAMTrainer_vit_t_budget",
    "nnUNetTrainer_budget",
]
