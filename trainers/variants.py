"""Other backbones, the paper's settings, and shorter trainings, by class name in nnU-Net's manner."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from torch import nn

from masksam_nnunet.method import Recipe, find_method
from masksam_nnunet.plans.presets import load_preset

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


class AuthorsTrainer(MaskSAMTrainer):
    """The published optimizer, rates, and weights of cross-entropy and Dice, which are nnU-Net's in form.

    Those of a preset, whose plans ``masksam plan --preset`` writes, or those of the authors of another method.
    """

    def set_recipe(self) -> None:
        super().set_recipe()
        recipe = self.recipe
        self.initial_lr, self.warmup_iterations = recipe.learning_rate, recipe.warmup_iterations
        self.weight_decay, self.exponent = recipe.weight_decay, recipe.exponent
        self.gradient_clip = recipe.gradient_clip
        if self.preset is not None:
            self.num_epochs = load_preset(self.preset).epochs

    @property
    def recipe(self) -> Recipe:
        """The published one."""
        recipe = load_preset(self.preset).recipe if self.preset is not None else find_method(self.method).recipe
        assert recipe is not None
        return recipe

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The published one; all trained parameters get the same decay."""
        recipe = self.recipe
        options: dict[str, Any] = {"lr": self.initial_lr, "weight_decay": self.weight_decay, "fused": self.fused}
        if recipe.optimizer == "SGD":
            return torch.optim.SGD(trained, **options, momentum=recipe.momentum, nesterov=True)
        adam = torch.optim.AdamW if recipe.optimizer == "AdamW" else torch.optim.Adam
        return adam(trained, **options, eps=recipe.eps)

    def _build_loss(self) -> nn.Module:
        semantic = super()._build_loss()
        for module in semantic.modules():
            if isinstance(module, DC_and_CE_loss | DC_and_BCE_loss):
                module.weight_ce, module.weight_dice = self.recipe.cross_entropy, self.recipe.dice
        return semantic


class MaskSAMTrainer_acdc(AuthorsTrainer):
    """The paper's ACDC setting."""

    preset = "acdc"


class MaskSAMTrainer_synapse(AuthorsTrainer):
    """The paper's Synapse setting."""

    preset = "synapse"


class MaskSAMTrainer_amos(AuthorsTrainer):
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
