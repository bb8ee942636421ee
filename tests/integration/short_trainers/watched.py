"""Trainers of a few iterations that tell a ledger what they do, and whose moments tests can choose."""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from masksam_nnunet.trainers import MaskSAMTrainer_tiny


class SeededLoader:
    """Draws the batch of an iteration alike whenever it is drawn: two trainings can be compared to the last bit."""

    def __init__(self, loader, trainer):
        self.loader, self.trainer = loader, trainer

    def __next__(self):
        np.random.seed(self.trainer.iteration)
        torch.manual_seed(self.trainer.iteration)
        return next(self.loader)


class WatchedMaskSAM(MaskSAMTrainer_tiny):
    """Variables: TEST_EPOCHS, TEST_ITERATIONS, TEST_LEDGER, TEST_STEP_SECONDS."""

    def initialize(self):
        torch.manual_seed(0)
        self.num_epochs = int(os.environ.get("TEST_EPOCHS", 2))
        self.num_iterations_per_epoch = int(os.environ.get("TEST_ITERATIONS", 2))
        self.num_val_iterations_per_epoch = 1
        super().initialize()
        self.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch here

    def get_dataloaders(self):
        train, validation = super().get_dataloaders()
        self._workers = [process.pid for process in getattr(train, "_processes", ())]
        return (train if self._workers else SeededLoader(train, self)), validation

    def on_loop_start(self):
        super().on_loop_start()
        self._tell("start", workers=self._workers)

    def train_step(self, batch):
        self._tell("step")
        time.sleep(float(os.environ.get("TEST_STEP_SECONDS", 0)))
        return super().train_step(batch)

    def save(self, file, must):
        super().save(file, must)
        self._tell("saved", file=file.name)

    def perform_actual_validation(self, save_probabilities=False):
        self._tell("validation")

    def _tell(self, event, **more):
        ledger = os.environ.get("TEST_LEDGER")
        if ledger:
            with Path(ledger).open("a") as stream:
                stream.write(json.dumps({"event": event, "iteration": self.iteration, **more}) + "\n")
