"""The paper's trainings: optimizer and epochs of a preset; ``masksam plan --preset`` writes the plans to go with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from masksam_nnunet.plans.presets import Preset, load_preset

from .masksam import MaskSAMTrainer


class PublishedTrainer(MaskSAMTrainer):
    """Trains as ``presets/NAME.json`` says."""

    def set_recipe(self) -> None:
        settings = self.published.optimizer
        self.num_epochs = self.published.epochs
        self.initial_lr = settings.learning_rate
        self.weight_decay = settings.weight_decay
        self.warmup_iterations = settings.warmup_iterations
        self.gradient_clip = settings.gradient_clip

    @property
    def published(self) -> Preset:
        """The setting."""
        assert self.preset is not None
        return load_preset(self.preset)

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The published one, over all trained parameters alike."""
        settings = self.published.optimizer
        options: dict[str, Any] = {"lr": self.initial_lr, "weight_decay": self.weight_decay}
        if settings.name == "SGD":
            return torch.optim.SGD(
                trained, **options, momentum=settings.momentum or 0.0, nesterov=True, fused=self.fused
            )
        return torch.optim.AdamW(trained, **options, eps=settings.eps or 1e-8, fused=self.fused)


class MaskSAMTrainer_acdc(PublishedTrainer):
    """The paper's ACDC setting."""

    preset = "acdc"


class MaskSAMTrainer_synapse(PublishedTrainer):
    """The paper's Synapse setting."""

    preset = "synapse"


class MaskSAMTrainer_amos(PublishedTrainer):
    """The paper's AMOS setting."""

    preset = "amos"
