"""Trainers of the related methods, three for each: ``SAMedTrainer``, ``SAMedTrainer_author``, ``SAMedTrainer_budget``.

The first is trained as MaskSAM is, for comparisons that differ in nothing else; the second as its authors train it.
Epochs, patches and folds are nnU-Net's in all.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from torch import nn

from masksam_nnunet.method import MASKSAM, Method, Recipe, find_method, methods

from .masksam import MaskSAMTrainer
from .time_budget import SAMBudgetTrainer


class AuthorsTrainer(MaskSAMTrainer):
    """A method's own optimizer, rates, and weights of cross-entropy and Dice, which are nnU-Net's in form."""

    def set_recipe(self) -> None:
        super().set_recipe()
        recipe = self.recipe
        self.initial_lr, self.warmup_iterations = recipe.learning_rate, recipe.warmup_iterations
        self.weight_decay, self.exponent = recipe.weight_decay, recipe.exponent

    @property
    def recipe(self) -> Recipe:
        """The authors'."""
        recipe = find_method(self.method).recipe
        assert recipe is not None
        return recipe

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The authors'."""
        options: dict[str, Any] = {"lr": self.initial_lr, "weight_decay": self.weight_decay, "fused": self.fused}
        if self.recipe.optimizer == "SGD":
            return torch.optim.SGD(trained, **options, momentum=0.99, nesterov=True)
        return {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[self.recipe.optimizer](trained, **options)

    def _build_loss(self) -> nn.Module:
        semantic = super()._build_loss()
        for module in semantic.modules():
            if isinstance(module, DC_and_CE_loss | DC_and_BCE_loss):
                module.weight_ce, module.weight_dice = self.recipe.cross_entropy, self.recipe.dice
        return semantic


def _trainer(method: Method, base: type[MaskSAMTrainer], suffix: str) -> type[MaskSAMTrainer]:
    """A trainer of a method; checkpoints and nnU-Net know it by its name in this module."""
    text = f"{method.source}{suffix.replace('_', ': ')}."
    return type(method.trainer + suffix, (base,), {"method": method.name, "__module__": __name__, "__doc__": text})


_MADE = [
    _trainer(method, base, suffix)
    for method in methods().values()
    if method.name != MASKSAM
    for base, suffix in ((MaskSAMTrainer, ""), (AuthorsTrainer, "_author"), (SAMBudgetTrainer, "_budget"))
]
globals().update({trainer.__name__: trainer for trainer in _MADE})
__all__ = [trainer.__name__ for trainer in _MADE]
