"""Trainers of a few iterations, found by nnU-Net through nnUNet_extTrainer like any other."""

import os

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from masksam_nnunet.trainers import MaskSAMTrainer, MaskSAMTrainer_tiny


def shorten(trainer):
    trainer.num_iterations_per_epoch = 2
    trainer.num_val_iterations_per_epoch = 1
    trainer.num_epochs = int(os.environ.get("TEST_EPOCHS", 1))


class Short:
    def initialize(self):
        shorten(self)
        super().initialize()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        settings = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if os.environ.get("TEST_MIRRORING", "1") == "0":
            self.inference_allowed_mirroring_axes = None  # eight times as fast
        return settings


class ShortMaskSAM(Short, MaskSAMTrainer_tiny):
    pass


class ShortMaskSAM_vit_b(Short, MaskSAMTrainer):
    pass


class ShortNNUNet(Short, nnUNetTrainer):
    pass
