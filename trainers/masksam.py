"""MaskSAM as an nnU-Net trainer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.cost import training_cost
from masksam_nnunet.environment import (
    FROZEN_BFLOAT16,
    LEAN_CHECKPOINTS,
    MAX_SKIPPED,
    RANDOM_INIT,
    SLICES_AT_ONCE,
    number_in,
    switched_on,
)
from masksam_nnunet.gpu import gpu_trouble
from masksam_nnunet.losses.criterion import DECODER_DICE, MaskSAMCriterion, SemanticCriterion
from masksam_nnunet.method import MASKSAM, build_network
from masksam_nnunet.modeling import SAMNetwork, count_parameters
from masksam_nnunet.modeling.compute import autocast, autocast_dtype
from masksam_nnunet.plans.architecture import DECISIONS, EPOCHS, read_config
from masksam_nnunet.plans.speed import FULL_EPOCHS, ITERATIONS, expected_device
from masksam_nnunet.plans.training_inputs import training_config
from masksam_nnunet.sam_files import seen_before
from masksam_nnunet.sam_weights import find, identified

from .finite_guard import FiniteGuard, Iteration, can_skip, ready_to_skip
from .resumable import RateOfTrainer, ResumableTrainer

SAM_RATE, TINY_RATE = (1e-4, 1000), (3e-3, 30)
"""Learning rate and warm-up iterations with a frozen SAM, and with the tiny encoder, which starts from random."""
MOST_SKIPPED = 100
"""Iterations in a row without a step that end a training."""
TIMED_AFTER, TIMED = 5, 50
"""Iterations before those that are timed, and of those."""
SKIPPED = "skipped"
"""The name beside the loss terms of 1.0 for an iteration without a step, else 0.0."""


class MaskSAMTrainer(ResumableTrainer):
    """Trains MaskSAM with a frozen SAM: ViT-B on plain plans, else the backbone that MaskSAM plans name.

    nnU-Net's schedule of 1000 epochs of 250 iterations, for a fair comparison, or fewer if the plans say so. AdamW, as
    nnU-Net's maintainers advise for transformers, with warm-up and their polynomial decay, over the trained parameters
    only.
    """

    backbone: str | None = None
    """The backbone of a subclass; None takes the plans', or vit_b on plain plans."""
    preset: str | None = None
    """The published setting that a subclass trains, and that its plans must hold."""
    method = MASKSAM
    """How a subclass adapts SAM."""
    gradient_clip = 12.0
    exponent = 0.9
    """Of the polynomial decay of the learning rate, nnU-Net's."""
    epochs: int | None = None
    """Of a subclass; None takes the plans', or nnU-Net's 1000 on plain plans."""
    tells_hours = True
    """Whether the log says how long the training takes."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ) -> None:
        if device.type == "cuda" and (trouble := gpu_trouble()):
            raise ConfigError(f"-device cuda: {trouble}")
        # Before nnU-Net copies and caches the plans; it saves them with the model.
        self.config: MaskSAMConfig = training_config(
            plans, configuration, fold, dataset_json, type(self).__name__, self.backbone, self.preset, self.method
        )
        self.most_skipped = number_in(MAX_SKIPPED) or MOST_SKIPPED  # an error here leaves no results folder
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.set_recipe()
        self.enable_deep_supervision = False
        self.iteration = self._iterations_here = 0
        self._clock = 0.0
        if autocast_dtype(self.device) != torch.float16:
            self.grad_scaler = None

    def set_recipe(self) -> None:
        """Set learning rate, warm-up and number of epochs; called after nnU-Net's constructor has set its own."""
        self.initial_lr, self.warmup_iterations = SAM_RATE if self.config.sam else TINY_RATE
        decisions = self.plans_manager.plans.get(DECISIONS, {})
        own = "3d_fullres" if self.is_cascaded else self.configuration_name  # a cascade has 3d_fullres's network
        planned = decisions.get(own, {})
        self.num_epochs = self.epochs or planned.get(EPOCHS, FULL_EPOCHS)

    # ---- network -------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        super().initialize()
        if isinstance(self.network, DistributedDataParallel):
            # Buffers are constants; ranks must not wait for one without a case to validate.
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
                f"plans {plans_manager.plans_name!r} hold {configuration_manager.network_arch_class_name}, no MaskSAM "
                "config: use the plans.json in the results folder of a trained MaskSAM."
            )
        image_channels = min(len(configuration_manager.normalization_schemes), num_input_channels)
        network: SAMNetwork = build_network(config, num_input_channels, num_output_channels, image_channels)
        if hasattr(network.image_encoder, "slices_at_once"):
            # A setting of this machine, not of the model.
            network.image_encoder.slices_at_once = number_in(SLICES_AT_ONCE)
        return network

    @property
    def sam_network(self) -> SAMNetwork:
        """The network without the wrappers of DDP and torch.compile."""
        return self.bare_network  # type: ignore[return-value]

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The networks decide for themselves what is supervised."""

    def plot_network_architecture(self) -> None:
        """Logs the numbers of parameters instead of drawing the network."""
        self.print_to_log_file(f"Config: {self.config.to_json()}", also_print_to_console=False)
        self.print_to_log_file(f"Parameters of {self.config.method} (all, trained):")
        for part, total, trained in count_parameters(self.sam_network):
            self.print_to_log_file(f"  {part:<18}{total:>14,}{trained:>14,}", add_timestamp=False)

    # ---- optimization --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, RateOfTrainer]:
        optimizer = ready_to_skip(self.make_optimizer([p for p in self.network.parameters() if p.requires_grad]))
        return optimizer, RateOfTrainer(self)

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, without decay of biases and norms."""
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.initial_lr, fused=self.fused)

    @property
    def fused(self) -> bool | None:
        """The optimizer's option: fused ones can skip a step."""
        return True if can_skip(self.device) else None

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return self.iteration / (self.num_epochs * self.num_iterations_per_epoch)

    def set_learning_rate(self) -> None:
        """Linear warm-up and nnU-Net's polynomial decay, before every iteration."""
        # A short variant must reach its learning rate too.
        warmup = min(self.warmup_iterations, self.num_epochs * self.num_iterations_per_epoch // 10)
        warm = min(1.0, (self.iteration + 1) / warmup) if warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * warm * max(0.0, 1 - self.progress) ** self.exponent

    def _build_loss(self) -> nn.Module:
        semantic = super()._build_loss()  # nnU-Net's own Dice + cross-entropy, also the validation loss
        labels = self.label_manager
        self.criterion: MaskSAMCriterion | SemanticCriterion = (
            MaskSAMCriterion(self.config, labels.num_segmentation_heads, labels.ignore_label, semantic)
            if self.config.method == MASKSAM
            else SemanticCriterion(self.config, semantic)
        )
        return semantic

    # ---- SAM's weights -------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self._load_sam()
        if switched_on(FROZEN_BFLOAT16):
            self._store_frozen()
        self.iteration = self.current_epoch * self.num_iterations_per_epoch + len(self.outputs)
        super().on_train_start()

    def _load_sam(self) -> None:
        """Load SAM's weights when a training starts; a resumed one has them from its checkpoint.

        Raises:
            ConfigError: lean checkpoints are asked for, but SAM's part has random weights that no file could restore.
            WeightsError: SAM's file is missing, damaged, untrusted or does not fit.
        """
        network, sam = self.sam_network, self.config.sam
        if sam is None:
            self.print_to_log_file(f"{self.config.backbone} is {self.config.encoder.description}.")
        elif not network.sam_is_loaded and switched_on(RANDOM_INIT):
            self.print_to_log_file(
                f"WARNING: {RANDOM_INIT} is set. SAM's part of this network keeps RANDOM, frozen weights. This is for "
                "tests only; the results say nothing about MaskSAM."
            )
        elif not network.sam_is_loaded:
            for line in network.load_sam(find(sam)):
                self.print_to_log_file(line)
        elif sha256 := network.sam_sha256():
            self.print_to_log_file(f"SAM weights from a checkpoint of this network (SHA-256 {sha256})")
        file = identified(network.sam_sha256())
        if file is not None and (warning := seen_before(file, self.plans_manager.dataset_name)):
            self.print_to_log_file(f"WARNING: {warning}.")
        if not switched_on(LEAN_CHECKPOINTS):
            return
        if sam is None:
            self.print_to_log_file(f"{LEAN_CHECKPOINTS} has no effect: {self.config.backbone} holds no SAM.")
        elif network.sam_sha256() is None:
            raise ConfigError(
                f"{LEAN_CHECKPOINTS} is set, but SAM's part holds random weights ({RANDOM_INIT}) that no file could "
                f"restore: unset {LEAN_CHECKPOINTS}, or start with SAM's weights."
            )
        else:
            self.print_to_log_file(
                f"{LEAN_CHECKPOINTS} is set: checkpoints leave out SAM's frozen weights, and loading them needs the "
                f"{sam} file (SHA-256 {network.sam_sha256()}). masksam export makes a full model."
            )

    def _store_frozen(self) -> None:
        if autocast_dtype(self.device) != torch.bfloat16:
            raise ConfigError(
                f"{FROZEN_BFLOAT16} = 1 needs a GPU that trains in bfloat16, not {self.device}: unset it."
            )
        saved = self.sam_network.store_frozen(torch.bfloat16)
        self.print_to_log_file(f"SAM's frozen linear maps are stored in bfloat16: {saved / 2**20:.0f} MiB less")

    def network_weights(self) -> Mapping[str, Tensor]:
        """Without SAM's frozen weights where lean checkpoints are asked for."""
        with self.sam_network.lean_state_dicts() if switched_on(LEAN_CHECKPOINTS) else nullcontext():
            return super().network_weights()

    # ---- training ------------------------------------------------------------------------------------------------

    def on_loop_start(self) -> None:
        super().on_loop_start()
        if not self.tells_hours or self.local_rank:
            return
        device = expected_device(self.device)
        inputs = self.num_input_channels, self.label_manager.num_segmentation_heads, self.batch_size
        cost = training_cost(self.config, *inputs, device.precision if device else "bfloat16")
        text = f"An iteration takes about {cost.tflop:.3g} TFLOP, and {cost.peak_gib:.3g} GiB at its peak"
        if device is None:
            text += f"; how long that takes is known after {TIMED} iterations."
        else:
            hours = device.hours(cost.tflop, self._iterations_left / ITERATIONS)
            text += (
                f"; {self._iterations_left} of them at {device.tflops:.3g} TFLOP/s ({device.name}, {device.source}) "
                f"take about {_duration(hours)}. This is corrected after {TIMED} iterations."
            )
        self.print_to_log_file(text)
        free = (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / 2**30  # weights are here
        if self.device.type == "cpu" and cost.peak_gib > free:  # on a GPU PyTorch says so itself
            self.print_to_log_file(
                f"WARNING: {cost.peak_gib:.3g} GiB are more than the {free:.3g} GiB of memory that this process can "
                f"have: the system may kill it. masksam plan --gpu cpu --gpu-memory {free:.1f} plans for that."
            )

    @property
    def _iterations_left(self) -> int:
        return self.num_epochs * self.num_iterations_per_epoch - self.iteration

    def _tell_hours(self) -> None:
        """Measure :data:`TIMED` iterations of this process, after a few slower ones."""
        self._iterations_here += 1
        if self._iterations_here == TIMED_AFTER:
            self._clock = time.monotonic()
        elif self._iterations_here == TIMED_AFTER + TIMED and self.tells_hours:
            seconds = (time.monotonic() - self._clock) / TIMED
            self.print_to_log_file(
                f"An iteration takes {seconds:.3g} s: the {self._iterations_left} left take about "
                f"{_duration(seconds * self._iterations_left / 3600)}, without validation."
            )

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.set_learning_rate()
        if isinstance(self.criterion, SemanticCriterion):
            self.criterion.progress = self.progress
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            output = self.network(data)
        loss, terms = self.criterion(output, target)

        checked = self.guard.checked(loss)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(checked).backward()
            self.grad_scaler.unscale_(self.optimizer)
            bad, norms = self.guard.clip(self.gradient_clip)
            scale = self.grad_scaler.scale(torch.ones_like(loss))
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            bad = self.guard.unless_settling(bad, loss, scale)
        else:
            checked.backward()
            bad, norms = self.guard.clip(self.gradient_clip)
            self.guard.step(self.optimizer, bad)
        loss = loss.detach()
        rate = self.optimizer.param_groups[0]["lr"]
        self.guard.note(Iteration(self.iteration, rate, batch, loss, terms, bad, norms))
        self.iteration += 1
        self._tell_hours()
        return {"loss": loss, **terms, SKIPPED: bad}  # on the device: waiting for them would idle it

    @cached_property
    def guard(self) -> FiniteGuard:
        """The guard of this training's steps."""
        parts: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.sam_network.named_parameters():
            if parameter.requires_grad:
                parts[name.split(".")[0]].append(parameter)
        return FiniteGuard(parts, self.most_skipped)

    def trouble(self) -> str | None:
        """Too many iterations in a row whose loss or gradient is not finite."""
        reports = self.guard.new_reports()
        if self.guard.skipped <= self.guard.limit:  # the log need not hold every one of them
            for report in reports:
                self.print_to_log_file(f"WARNING: no step, the loss or its gradient is not finite: {report}")
        return self.guard.diagnosis()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        rows = [torch.stack([torch.as_tensor(x, device=self.device) for x in o.values()]) for o in train_outputs]
        table = torch.stack(rows)  # (iterations, values); the last says whether a step was skipped
        if self.is_ddp:  # a rank's own loss may have told it more
            skipped = table[:, -1].contiguous()
            dist.all_reduce(skipped, dist.ReduceOp.MAX)
            table[:, -1] = skipped
        every = [dict(zip(train_outputs[0], values, strict=True)) for values in table.cpu().numpy()]
        made = [outputs for outputs in every if not outputs[SKIPPED]]
        if len(made) < len(every):
            self.print_to_log_file(
                f"{len(every) - len(made)} of {len(every)} iterations of this epoch made no step: their loss or "
                "gradient is not finite"
            )
        train_outputs = made or every
        super().on_train_epoch_end(train_outputs)
        means = {name: float(np.mean(values)) for name, values in collate_outputs(train_outputs).items()}
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = {name: float(np.mean([m[name] for m in gathered])) for name in means}
        del means["loss"], means[SKIPPED]
        added, gain = means.pop(DECODER_DICE, None), getattr(getattr(self.sam_network, "mask_head", None), "gain", None)
        self.print_to_log_file("loss terms", ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        logged = {f"train_losses/{name}": value for name, value in means.items()}
        if gain is not None:
            gains = gain.detach().abs().cpu().numpy()
            logged["sam_decoder/gain"] = float(gains.mean())
            text = f"SAM's decoder: gain {gains.mean():.4f} (largest {gains.max():.4f})"
            if added is not None:  # without nnU-Net's loss on the output there is no Dice of it
                logged["sam_decoder/dice_change"] = added
                text += f"; it and the mask head change the Dice of training patches by {added:+.4f}"
            self.print_to_log_file(text)
        for logger in self.logger.loggers:  # nnU-Net's local logger takes known keys only
            for name, value in logged.items():
                logger.log(name, value, self.current_epoch)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
