"""Other backbones, and shorter trainings by class name, in nnU-Net's manner."""

from __future__ import annotations

from .masksam import MaskSAMTrainer


class MaskSAMTrainer_vit_l(MaskSAMTrainer):
    """SAM ViT-L."""

    backbone = "vit_l"


class MaskSAMTrainer_vit_h(MaskSAMTrainer):
    """SAM ViT-H."""

    backbone = "vit_h"


class MaskSAMTrainer_tiny(MaskSAMTrainer):
    """The tiny encoder of ours, for CPUs, tests and demos. It is not SAM, and is trained from nothing."""

    backbone = "tiny"


class MaskSAMTrainer_1epoch(MaskSAMTrainer):
    """1 epoch."""

    epochs = 1


class MaskSAMTrainer_5epochs(MaskSAMTrainer):
    """5 epochs."""

    epochs = 5


class MaskSAMTrainer_50epochs(MaskSAMTrainer):
    """50 epochs."""

    epochs = 50


class MaskSAMTrainer_100epochs(MaskSAMTrainer):
    """100 epochs."""

    epochs = 100


class MaskSAMTrainer_250epochs(MaskSAMTrainer):
    """250 epochs."""

    epochs = 250


class MaskSAMTrainer_500epochs(MaskSAMTrainer):
    """500 epochs."""

    epochs = 500


class MaskSAMTrainer_tiny_1epoch(MaskSAMTrainer_tiny):
    """1 epoch."""

    epochs = 1


class MaskSAMTrainer_tiny_5epochs(MaskSAMTrainer_tiny):
    """5 epochs."""

    epochs = 5


class MaskSAMTrainer_tiny_50epochs(MaskSAMTrainer_tiny):
    """50 epochs."""

    epochs = 50
