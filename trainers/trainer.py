"""MaskSAM as an nnU-Net trainer: hooks only, the rest is nnU-Net's."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from masksam_nnunet import weights
from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.criterion import MaskSAMCriterion
from masksam_nnunet.environment import LEAN_CHECKPOINTS, RANDOM_INIT, SLICES_AT_ONCE, number_in, switched_on
from masksam_nnunet.modeling import MaskSAM, count_parameters
from masksam_nnunet.modeling.lean import lean_state_dicts, sam_sha256, set_sam_sha256
from masksam_nnunet.plans.architecture import read_config
from masksam_nnunet.precision import autocast, autocast_dtype

from .config_check import check_preset, check_results_folder, check_shared_data, resolve_config
from .schedule import WarmupPolyLR

SAM_RATE, TINY_RATE = (1e-4, 1000), (3e-3, 30)
"""Learning rate and warm-up iterations for a frozen SAM, and for the tiny network, which starts from nothing."""


class MaskSAMTrainer(nnUNetTrainer):
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
        super().__init__(plans, configuration, fold, dataset_json, device)
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
        # Of this machine, not of the model: the same folds may train and predict with other values.
        network.image_encoder.slices_at_once = number_in(SLICES_AT_ONCE)
        return network

    @property
    def masksam(self) -> MaskSAM:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network  # type: ignore[return-value]

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
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        # A short variant must reach its learning rate too.
        warmup = min(self.warmup_iterations, self.num_epochs * self.num_iterations_per_epoch // 10)
        return optimizer, WarmupPolyLR(optimizer, self.initial_lr, self.num_epochs, warmup)

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, without decay of biases and norms."""
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.initial_lr)

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
        self.iteration = self.current_epoch * self.num_iterations_per_epoch
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
        sha256 = sam_sha256(self.masksam)
        if lean and sha256 is None:
            raise ConfigError(
                f"{LEAN_CHECKPOINTS} is set, but SAM's part of this network holds random weights ({RANDOM_INIT}), "
                f"which no file could restore. Unset {LEAN_CHECKPOINTS}, or start with SAM's weights."
            )
        if lean:
            self.print_to_log_file(
                f"{LEAN_CHECKPOINTS} is set: checkpoints leave out SAM's frozen weights, and need SAM's "
                f"{self.config.backbone} file (SHA-256 {sha256}) to be loaded. masksam export makes a full model."
            )

    def _tell_it_is_not_sam(self, lean: bool) -> None:
        if not self.masksam.sam_is_loaded:
            self.print_to_log_file(
                f"{self.config.backbone} is a tiny encoder of this project's own. It is not SAM: it starts from random "
                "weights and is trained throughout."
            )
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
        path = weights.find(self.config.backbone)
        new = [name for name, p in network.named_parameters() if p.requires_grad]
        report = weights.load_sam(network.sam_parts(), self.config.backbone, path, new)
        network.sam_is_loaded = True
        set_sam_sha256(network, report.sha256)
        for line in report.lines():
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

        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip)
            self.optimizer.step()
        self.iteration += 1
        return {"loss": loss.detach(), **terms}  # on the device: waiting for them would idle it

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        table = torch.stack([torch.stack(list(outputs.values())) for outputs in train_outputs]).cpu().numpy()
        train_outputs = [dict(zip(train_outputs[0], values, strict=True)) for values in table]
        super().on_train_epoch_end(train_outputs)
        means = {name: float(np.mean(values)) for name, values in collate_outputs(train_outputs).items()}
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = {name: float(np.mean([m[name] for m in gathered])) for name in means}
        means.pop("loss")
        self.print_to_log_file("loss terms", ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        for logger in self.logger.loggers:  # nnU-Net's local logger takes known keys only
            for name, value in means.items():
                logger.log(f"train_losses/{name}", value, self.current_epoch)

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, but a kill in the middle leaves the earlier file whole; without SAM's weights where asked."""
        partial = f"{filename}.part"
        with lean_state_dicts(self.masksam) if switched_on(LEAN_CHECKPOINTS) else nullcontext():
            super().save_checkpoint(partial)
        if self.local_rank == 0 and not self.disable_checkpointing:  # the rank that writes
            os.replace(partial, filename)
