"""MaskSAM as an nnU-Net trainer: hooks only, the rest is nnU-Net's."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.environment import (
    LEAN_CHECKPOINTS,
    MAX_SKIPPED,
    RANDOM_INIT,
    SLICES_AT_ONCE,
    number_in,
    switched_on,
)
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAM, count_parameters
from masksam_nnunet.modeling.compute import autocast, autocast_dtype
from masksam_nnunet.modeling.image_encoder import AdaptedImageEncoder
from masksam_nnunet.plans.architecture import read_config
from masksam_nnunet.sam_weights import find

from .config_check import check_preset, check_results_folder, check_shared_data, resolve_config
from .finite_guard import FiniteGuard, Iteration, can_skip, ready_to_skip
from .resumable import ResumableTrainer
from .schedule import WarmupPolyLR

SAM_RATE, TINY_RATE = (1e-4, 1000), (3e-3, 30)
"""Learning rate and warm-up iterations for a frozen SAM, and for the tiny network, which starts from nothing."""


MOST_SKIPPED, SKIPPED_SHARE, FEWEST_SKIPPED = 100, 0.5, 10
"""Iterations without a step that end a training: in a row; the share of an epoch, if there are at least so many."""
SKIPPED = "skipped"
"""The name beside the loss terms."""


class MaskSAMTrainer(ResumableTrainer):
    """Trains MaskSAM with a frozen SAM: ViT-B on plain plans, else the backbone that MaskSAM plans name.

    nnU-Net's schedule of 1000 epochs of 250 iterations, for a fair comparison. AdamW, as nnU-Net's maintainers advise
    for transformers, with warm-up and their polynomial decay, over the trained parameters only.
    """

    backbone: str | None = None
    """What a subclass trains, whatever the plans; None: the plans say, and vit_b where they know nothing of it."""
    preset: str | None = None
    """The published setting that a subclass belongs to, and that its plans must hold."""
    gradient_clip = 12.0
    epochs = 1000

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ) -> None:
        # Before nnU-Net copies and caches the plans; it saves them with the model.
        name = type(self).__name__
        self.config: MaskSAMConfig = resolve_config(plans, configuration, dataset_json, self.backbone, name)
        check_preset(plans, configuration, self.preset, name)
        check_shared_data(plans, configuration)
        check_results_folder(plans, configuration, fold, self.config, name)
        most_skipped = number_in(MAX_SKIPPED) or MOST_SKIPPED
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.most_skipped = most_skipped
        self._guard: FiniteGuard | None = None
        self.set_recipe()
        self.enable_deep_supervision = False
        self.iteration = 0
        if autocast_dtype(self.device) != torch.float16:
            self.grad_scaler = None

    def set_recipe(self) -> None:
        """Rates and number of epochs; nnU-Net's constructor has set its own."""
        self.initial_lr, self.warmup_iterations = SAM_RATE if self.config.needs_sam else TINY_RATE
        self.num_epochs = self.epochs

    # ---- network -------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        super().initialize()
        if isinstance(self.network, DistributedDataParallel):
            # They are constants, equal since DDP was made; a rank without a case to validate must not be waited for.
            self.network.broadcast_buffers = False

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network that the plans' config describes; also called by nnU-Net to predict."""
        config = read_config(configuration_manager)
        if config is None:
            raise ConfigError(
                f"these plans ({plans_manager.plans_name}) hold {configuration_manager.network_arch_class_name}, no "
                "MaskSAM config. A trained MaskSAM's own plans.json, in its results folder, holds one: use that folder."
            )
        image_channels = min(len(configuration_manager.normalization_schemes), num_input_channels)
        network = MaskSAM(config, num_input_channels, num_output_channels, image_channels)
        if isinstance(network.image_encoder, AdaptedImageEncoder):
            # Of this machine, not of the model: the same folds may train and predict with other values.
            network.image_encoder.slices_at_once = number_in(SLICES_AT_ONCE)
        return network

    @property
    def masksam(self) -> MaskSAM:
        """The network without the wrappers of DDP and torch.compile."""
        return self.bare_network  # type: ignore[return-value]

    def _do_i_compile(self) -> bool:
        # Stock nnU-Net compiles on CUDA unless told not to. Here it is opt-in (nnUNet_compile=1): what it gains has
        # not been measured on a GPU yet, and compiling ViT-H costs minutes.
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """MaskSAM has none."""

    def plot_network_architecture(self) -> None:
        """Instead of a drawing, which is optional in nnU-Net, the numbers of parameters are logged."""
        self.print_to_log_file(f"MaskSAM config: {self.config.to_json()}", also_print_to_console=False)
        self.print_to_log_file("Parameters of MaskSAM (all, trained):")
        for part, total, trained in count_parameters(self.masksam):
            self.print_to_log_file(f"  {part:<18}{total:>14,}{trained:>14,}", add_timestamp=False)

    # ---- optimisation --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupPolyLR]:
        optimizer = ready_to_skip(self.make_optimizer([p for p in self.network.parameters() if p.requires_grad]))
        # A short variant must reach its learning rate too.
        warmup = min(self.warmup_iterations, self.num_epochs * self.num_iterations_per_epoch // 10)
        return optimizer, WarmupPolyLR(optimizer, self.initial_lr, self.num_epochs, warmup)

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, without decay of biases and norms."""
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.initial_lr, fused=self.fused)

    @property
    def fused(self) -> bool | None:
        """Of optimizers: the fused ones can leave a step out."""
        return True if can_skip(self.device) else None

    def _build_loss(self) -> nn.Module:
        semantic = super()._build_loss()  # nnU-Net's own Dice + cross-entropy, also the validation loss
        self.criterion = MaskSAMCriterion(
            self.config.loss,
            self.masksam.grid,
            self.label_manager.num_segmentation_heads,
            self.label_manager.has_regions,
            self.label_manager.ignore_label,
            semantic,
        )
        return semantic

    # ---- training ------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self._load_sam()
        self.iteration = self.current_epoch * self.num_iterations_per_epoch + self.done_of_epoch
        super().on_train_start()

    def _load_sam(self) -> None:
        """SAM's weights are opened by a training from its start only; checkpoints of ours hold or restore them.

        Raises:
            ConfigError: lean checkpoints are asked for, and what they leave out would not come from a file.
            WeightsError: SAM's file is missing, damaged, untrusted or does not fit.
        """
        lean = switched_on(LEAN_CHECKPOINTS)
        if not self.config.needs_sam:
            self._tell_it_is_not_sam(lean)
            return
        if not self.masksam.sam_is_loaded:
            self._read_sam()
        sha256 = self.masksam.sam_sha256()
        if lean and sha256 is None:
            raise ConfigError(
                f"{LEAN_CHECKPOINTS} is set, but SAM's part of this network holds random weights ({RANDOM_INIT}), "
                f"which no file could restore. Unset {LEAN_CHECKPOINTS}, or start with SAM's weights."
            )
        if lean:
            self.print_to_log_file(
                f"{LEAN_CHECKPOINTS} is set: checkpoints leave out SAM's frozen weights, and need SAM's "
                f"{self.config.sam} file (SHA-256 {sha256}) to be loaded. masksam export makes a full model."
            )

    def _tell_it_is_not_sam(self, lean: bool) -> None:
        if not self.masksam.sam_is_loaded:
            self.print_to_log_file(f"{self.config.backbone} is {self.config.encoder.description}.")
        if lean:
            self.print_to_log_file(
                f"{LEAN_CHECKPOINTS} is set, but {self.config.backbone} has nothing from SAM: checkpoints are full."
            )

    def _read_sam(self) -> None:
        network = self.masksam
        if switched_on(RANDOM_INIT):
            self.print_to_log_file(
                f"WARNING: {RANDOM_INIT} is set. SAM's part of this network stays at RANDOM, frozen weights. "
                "This is for trying things out only; its results say nothing about MaskSAM."
            )
            return
        assert self.config.sam is not None
        for line in network.load_sam(find(self.config.sam)).lines():
            self.print_to_log_file(line)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return self.iteration / (self.num_epochs * self.num_iterations_per_epoch)

    def set_learning_rate(self) -> None:
        """Before every iteration."""
        self.lr_scheduler.at(self.progress, self.iteration)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            output = self.network(data)
        loss, terms = self.criterion(output, target)

        checked = self.guard.checked(loss)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(checked).backward()
            self.grad_scaler.unscale_(self.optimizer)
            bad, norms = self.guard.clip(self.gradient_clip)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            checked.backward()
            bad, norms = self.guard.clip(self.gradient_clip)
            self.guard.step(self.optimizer, bad)
        loss = loss.detach()
        rate = self.optimizer.param_groups[0]["lr"]
        self.guard.note(bad, Iteration(self.iteration, rate, batch, loss, terms, norms))
        self.iteration += 1
        return {"loss": loss, **terms, SKIPPED: bad}  # on the device: waiting for them would idle it

    @property
    def guard(self) -> FiniteGuard:
        """Over the steps of this training."""
        if self._guard is None:
            parts: dict[str, list[nn.Parameter]] = defaultdict(list)
            for name, parameter in self.masksam.named_parameters():
                if parameter.requires_grad:
                    parts[name.split(".")[0]].append(parameter)
            self._guard = FiniteGuard(parts, self.most_skipped)
        return self._guard

    def trouble(self) -> str | None:
        """Too many iterations in a row whose loss or gradient is not finite."""
        lines = self.guard.look()
        if self.guard.skipped <= self.guard.limit:  # the log need not hold every one of them
            for line in lines:
                self.print_to_log_file(f"WARNING: no step, the loss or its gradient is not finite: {line}")
        return self._diagnosis(f"in {self.guard.in_a_row} iterations in a row") if self.guard.too_many else None

    def _diagnosis(self, how_often: str) -> str:
        latest = "\n  ".join(self.guard.descriptions()) or "the latest iterations were finite"
        return (
            f"the loss or its gradient was not finite {how_often}, in epoch {self.current_epoch} at the last:\n  "
            f"{latest}\nNo step was made in these iterations, and the checkpoints of before are kept. If the input is "
            "not finite, correct those cases and preprocess again; otherwise look at their labels, or train with a "
            f"lower learning rate (a trainer's initial_lr). {MAX_SKIPPED} sets how many in a row are too many"
        )

    def restored(self, outputs: dict[str, Tensor]) -> dict[str, Any]:
        return {name: value.to(self.device) for name, value in outputs.items()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        table = torch.stack([torch.stack(list(outputs.values())) for outputs in train_outputs]).cpu().numpy()
        every = [dict(zip(train_outputs[0], values, strict=True)) for values in table]
        # With several ranks the same on all of them: their gradients are one.
        made = [outputs for outputs in every if not outputs[SKIPPED]]
        self._tell_of_skipped(len(every) - len(made), len(every))
        train_outputs = made or every
        super().on_train_epoch_end(train_outputs)
        means = {name: float(np.mean(values)) for name, values in collate_outputs(train_outputs).items()}
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = {name: float(np.mean([m[name] for m in gathered])) for name in means}
        del means["loss"], means[SKIPPED]
        self.print_to_log_file("loss terms", ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        for logger in self.logger.loggers:  # nnU-Net's local logger takes known keys only
            for name, value in means.items():
                logger.log(f"train_losses/{name}", value, self.current_epoch)

    def _tell_of_skipped(self, skipped: int, iterations: int) -> None:
        if skipped:
            self.print_to_log_file(
                f"{skipped} of {iterations} iterations of this epoch made no step: their loss or gradient is not finite"
            )
        if skipped >= FEWEST_SKIPPED and skipped > SKIPPED_SHARE * iterations:
            raise TrainingError(self._diagnosis(f"in {skipped} of an epoch's {iterations} iterations"))

    def network_weights(self) -> Mapping[str, Tensor]:
        """Without SAM's frozen weights where lean checkpoints are asked for."""
        with self.masksam.lean_state_dicts() if switched_on(LEAN_CHECKPOINTS) else nullcontext():
            return super().network_weights()
