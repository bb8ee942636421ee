"""Other backbones, the paper's settings, and shorter trainings, by class name in nnU-Net's manner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from masksam_nnunet.plans.presets import Preset, load_preset

from .masksam import MaskSAMTrainer


class MaskSAMTrainer_vit_l(MaskSAMTrainer):
    """SAM ViT-L."""

    backbone = "vit_l"


class MaskSAMTrainer_vit_h(MaskSAMTrainer):
    """SAM ViT-H."""

    backbone = "vit_h"


class MaskSAMTrainer_medsam(MaskSAMTrainer):
    """MedSAM's ViT-B."""

    backbone = "medsam_vit_b"


class MaskSAMTrainer_mobile_sam(MaskSAMTrainer):
    """MobileSAM's TinyViT, with a stride of 16 as SAM's."""

    backbone = "mobile_sam"


class MaskSAMTrainer_lite_medsam(MaskSAMTrainer):
    """LiteMedSAM's TinyViT, for small cards."""

    backbone = "lite_medsam"


class MaskSAMTrainer_tiny(MaskSAMTrainer):
    """This project's tiny encoder, for CPUs, tests and demos. It is not SAM, and starts from random weights."""

    backbone = "tiny"


class PresetTrainer(MaskSAMTrainer):
    """The paper's optimizer and epochs for a preset; ``masksam plan --preset`` writes the plans to go with it."""

    def set_recipe(self) -> None:
        settings = self.published.optimizer
        self.num_epochs = self.published.epochs
        self.initial_lr = settings.learning_rate
        self.weight_decay = settings.weight_decay
        self.warmup_iterations = settings.warmup_iterations
        self.gradient_clip = settings.gradient_clip

    @property
    def published(self) -> Preset:
        """The preset."""
        assert self.preset is not None
        return load_preset(self.preset)

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The published one; all trained parameters get the same decay."""
        settings = self.published.optimizer
        options: dict[str, Any] = {"lr": self.initial_lr, "weight_decay": self.weight_decay, "fused": self.fused}
        if settings.name == "SGD":
            return torch.optim.SGD(trained, **options, momentum=settings.momentum or 0.0, nesterov=True)
        return torch.optim.AdamW(trained, **options, eps=settings.eps or 1e-8)


class MaskSAMTrainer_acdc(PresetTrainer):
    """The paper's ACDC setting."""

    preset = "acdc"


class MaskSAMTrainer_synapse(PresetTrainer):
    """The paper's Synapse setting."""

    preset = "synapse"


class MaskSAMTrainer_amos(PresetTrainer):
    """The paper's AMOS setting."""

    preset = "amos"


def _shorter(trainer: type[MaskSAMTrainer], epochs: int) -> type[MaskSAMTrainer]:
    """The trainer with a number of epochs; checkpoints and nnU-Net know it by its name in this module."""
    name = f"{trainer.__name__}_{epochs}epoch{'' if epochs == 1 else 's'}"
    return type(name, (trainer,), {"epochs": epochs, "__module__": __name__, "__doc__": f"{epochs} epochs."})


MaskSAMTrainer_1epoch = _shorter(MaskSAMTrainer, 1)
MaskSAMTrainer_5epochs = _shorter(MaskSAMTrainer, 5)
MaskSAMTrainer_50epochs = _shorter(MaskSAMTrainer, 50)
MaskSAMTrainer_100epochs = _shorter(MaskSAMTrainer, 100)
MaskSAMTrainer_250epochs = _shorter(MaskSAMTrainer, 250)
MaskSAMTrainer_500epochs = _shorter(MaskSAMTrainer, 500)
MaskSAMTrainer_tiny_1epoch = _shorter(MaskSAMTrainer_tiny, 1)
MaskSAMTrainer_tiny_5epochs = _shorter(MaskSAMTrainer_tiny, 5)
MaskSAMTrainer_tiny_50epochs = _shorter(MaskSAMTrainer_tiny, 50)
