"""Learning rate: linear warm-up, then nnU-Net's polynomial decay."""

from __future__ import annotations

import torch


class WarmupPolyLR:
    """Sets the learning rate of all groups from the share of the training that is done.

    nnU-Net calls ``step(epoch)`` at the start of an epoch; the trainer calls :meth:`at` before every iteration.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        initial_lr: float,
        num_epochs: int,
        warmup_iterations: int,
        exponent: float = 0.9,
    ) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.num_epochs = num_epochs
        self.warmup_iterations = warmup_iterations
        self.exponent = exponent

    def at(self, fraction: float, iteration: int) -> float:
        """Set and return the rate for the iteration (from 0) at this share of the whole training."""
        warm = min(1.0, (iteration + 1) / self.warmup_iterations) if self.warmup_iterations else 1.0
        rate = self.initial_lr * warm * max(0.0, 1 - fraction) ** self.exponent
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def step(self, epoch: int) -> None:
        """The rate at the start of an epoch, the warm-up apart."""
        self.at(epoch / self.num_epochs, self.warmup_iterations)
