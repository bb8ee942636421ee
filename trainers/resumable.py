"""nnU-Net's training loop, made resumable after kills, pre-emption, full disks and damaged files."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from masksam_nnunet.environment import TRAINING_STATS_FILE, cpu_name, untested_nnunet
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.files import once_written, write_json
from masksam_nnunet.modeling.compute import keep_freed_memory
from masksam_nnunet.plans.splits import SPLITS_FILE
from masksam_nnunet.stop_signals import REQUEUE, handling, leave_at_once

from . import checkpoint_files as files
from .loading import LoaderWatch, forks_end_with_parent, require_shared_memory

_GO, _STOP, _BROKEN = 0, 1, 2
_NEVER = 10**9
_WITHIN, _OWN = "masksam_within_epoch", "masksam_own"
"""In a checkpoint: what was done of the epoch that it was saved in; what the trainer's class adds to nnU-Net's."""


class RateOfTrainer:
    """In place of nnU-Net's scheduler, which steps once an epoch: the trainer sets the rate of each iteration itself.

    nnU-Net logs the rate that it finds after :meth:`step`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def step(self, _: int) -> None:
        """Called at the start of an epoch, and when an epoch goes on in another process."""
        self.trainer.set_learning_rate()
        if self.trainer.outputs and self.trainer.epoch_rate is not None:
            self.trainer.optimizer.param_groups[0]["lr"] = self.trainer.epoch_rate


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's loop, which can end after any iteration and continue from there.

    A checkpoint may be saved within an epoch: it then holds the outputs of the epoch's iterations so far, and the
    training continues with the next one. nnU-Net draws its batches at random, so there is no position in the data to
    restore. Writes ``training_stats.json`` into the fold's folder at the end.
    """

    save_default: files.SaveInterval = (50, 30.0)

    def __init__(self, *arguments: Any) -> None:
        epochs, self.save_minutes = files.save_interval(self.save_default)
        super().__init__(*arguments)
        self.save_every = epochs or _NEVER
        self.asked: signal.Signals | None = None
        """The signal that asked this training to stop."""
        self.outputs: list[dict[str, Any]] = []
        """The outputs of the current epoch's training iterations so far."""
        self._epoch_seconds = 0.0  # of the current epoch, in the processes before this one
        self.epoch_rate: float | None = None
        """The learning rate at the start of the epoch that the checkpoint was saved in."""
        self._peak_before = 0.0  # MiB, of those processes
        self._saved_at = 0.0
        self._agreeing: Any = None
        self.common_seconds = 0.0
        """:meth:`own_seconds` of the first rank, as all ranks know it since the last iteration."""
        plot = self.logger.plot_progress_png

        def plot_if_possible(folder: str) -> None:
            with self._allowed_to_fail("progress.png"):
                plot(folder)

        self.logger.plot_progress_png = plot_if_possible

    def _do_i_compile(self) -> bool:
        # nnU-Net compiles by default, and never on a CPU. Here it is opt-in, on a CPU too: ViT-H takes minutes, which a
        # budget counts.
        if self.device.type == "cpu":
            return os.environ.get("nnUNet_compile", "").lower() in ("true", "1", "t")  # as nnU-Net reads it
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    def on_train_start(self) -> None:
        found = version("nnunetv2")
        self.print_to_log_file(f"nnunetv2 {found} {untested_nnunet(found)}".rstrip())
        super().on_train_start()
        if self.device.type == "cpu":  # not before: the loaders' processes are forked from this one
            keep_freed_memory()

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's own, when another fold that starts at the same moment has written splits_final.json.

        Raises:
            TrainingError: the file cannot be read or written.
        """
        try:
            return once_written(super().do_split)
        except (OSError, json.JSONDecodeError) as error:
            raise TrainingError(
                f"{Path(self.preprocessed_dataset_folder_base, SPLITS_FILE)} cannot be read or written ({error}): make "
                "its folder writable for the first training, or write the file with masksam split"
            ) from error

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's own.

        Raises:
            TrainingError: its workers have too little shared memory, and would wait for ever.
        """
        ranks = dist.get_world_size() if self.is_ddp else 1
        voxels = ranks * self.batch_size * math.prod(self.configuration_manager.patch_size)
        targets = len(self.label_manager.foreground_regions) + 1 if self.label_manager.has_regions else 1
        # float32 images, int16 labels
        require_shared_memory(voxels * (4 * self.num_input_channels + 2 * targets), self.device.type == "cuda")
        return super().get_dataloaders()

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run_training(self) -> None:
        """nnU-Net's own loop.

        Raises:
            SystemExit: with status 75, after a signal; the training is saved.
            TrainingError: the training cannot continue.
        """
        with handling(leave_at_once):
            with forks_end_with_parent():
                self.on_train_start()
            if self.local_rank == 0:
                files.remove_drafts(Path(self.output_folder))
            if self.is_ddp:
                if sys.platform == "linux":  # gloo would look for the machine's name; nnU-Net's ranks share a machine
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                self._agreeing = dist.new_group(backend="gloo")  # no device has to be waited for
            train, validation = (LoaderWatch(x, self._gives_up) for x in (self.dataloader_train, self.dataloader_val))
            try:
                with handling(self._ask):
                    self._saved_at = time.monotonic()
                    self.on_loop_start()
                    while self.training_goes_on():
                        self.run_epoch(train, validation)
                    self.on_train_end()
                    if self.asked is not None:
                        self._leave("the training is done; its validation is not, and starts with --val or --c")
            finally:
                train.end()
                validation.end()

    def run_epoch(self, train: LoaderWatch, validation: LoaderWatch) -> None:
        """One epoch, or the rest of the one that the checkpoint was saved in."""
        self.on_epoch_start()
        self.on_train_epoch_start()
        while self.epoch_goes_on(len(self.outputs)):
            self.outputs.append(self.train_step(self._next_batch(train)))
            self._save_or_stop()
        self.on_train_epoch_end(self.outputs)
        with torch.no_grad():
            self.on_validation_epoch_start()
            validated: list[dict[str, Any]] = []
            while self.validation_goes_on(len(validated)):
                validated.append(self.validation_step(self._next_batch(validation)))
                self._save_or_stop()
            self.on_validation_epoch_end(validated)
        self.outputs = []
        self.on_epoch_end()

    def _next_batch(self, loader: LoaderWatch) -> dict[str, Any]:
        try:
            batch = loader.next_batch()
        except TrainingError as error:
            self.save(self._latest, must=False)
            raise TrainingError(f"{error}. Continue from the saved checkpoint with --c") from error
        return self._save_and_leave() if batch is None else batch

    def on_loop_start(self) -> None:
        """Called before the first epoch of this process."""

    def training_goes_on(self) -> bool:
        """Whether there is another epoch."""
        return bool(self.current_epoch < self.num_epochs)

    def epoch_goes_on(self, done: int) -> bool:
        """Whether the epoch has another iteration after ``done`` iterations."""
        return done < self.num_iterations_per_epoch

    def validation_goes_on(self, done: int) -> bool:
        """Whether the validation on patches has another batch after ``done`` batches."""
        return done < self.num_val_iterations_per_epoch

    def own_seconds(self) -> float:
        """Seconds of training, for those who go by the clock; asked after each iteration."""
        return 0.0

    def trouble(self) -> str | None:
        """Why the training cannot continue; asked after each iteration. One rank may know it before the others."""
        return None

    def on_epoch_start(self) -> None:
        # The time between two parts of an epoch does not count.
        self.logger.log("epoch_start_timestamps", time.time() - self._epoch_seconds, self.current_epoch)
        self._epoch_seconds = 0.0

    def on_train_end(self) -> None:
        if self.local_rank == 0:
            self.write_beside_checkpoints(TRAINING_STATS_FILE, self.training_stats())
        super().on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's own. A signal ends it at once with status 75: it always starts from its first case."""
        with handling(leave_at_once):
            super().perform_actual_validation(save_probabilities)

    def training_stats(self) -> dict[str, Any]:
        """The content of ``training_stats.json``: what the training took."""
        log = self.logger.get_checkpoint()
        epochs = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
        parameters = list(self.network.parameters())
        on_gpu = self.device.type == "cuda"
        return {
            "device": _device_name(self.device),
            "peak_memory_mib": self._peak_memory_mib(),
            "peak_memory_of": "GPU allocations" if on_gpu else "process, resident",
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "iterations": self.current_epoch * self.num_iterations_per_epoch,
            "epochs": self.current_epoch,
            "train_seconds": float(sum(end - start for start, end in epochs)),
            "batch_size": self.configuration_manager.batch_size,
            "patch_size": [int(size) for size in self.configuration_manager.patch_size],
        }

    def _peak_memory_mib(self) -> float:
        """Highest memory so far, in the processes before a resumption too."""
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if on_gpu else _peak_resident_mib()
        return max(self._peak_before, peak)

    def write_beside_checkpoints(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file into the fold's folder; a full disk does not end the training."""
        with self._allowed_to_fail(name):
            write_json(Path(self.output_folder, name), content)

    @contextlib.contextmanager
    def _allowed_to_fail(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.print_to_log_file(f"WARNING: {name} could not be written: {error}")

    # ---- ending early --------------------------------------------------------------------------------------------

    def _ask(self, received: signal.Signals) -> None:
        self.asked = self.asked or received

    def _save_or_stop(self) -> None:
        """After each iteration, save if it is time to, and end the training if it has to end."""
        trouble = self.trouble()
        verdict = self._agreed(_BROKEN if trouble else _STOP if self.asked is not None else _GO)
        if verdict == _BROKEN:
            raise TrainingError(trouble or "another rank cannot continue; its log says why")
        if verdict == _STOP:
            self._save_and_leave()
        if self.save_minutes is not None and time.monotonic() - self._saved_at > 60 * self.save_minutes:
            self.save(self._latest, must=False)

    def _agreed(self, verdict: int) -> int:
        """The gravest verdict of all ranks: they must leave after the same iteration, or one waits for the other."""
        if self._agreeing is None:
            self.common_seconds = self.own_seconds()
            return verdict
        # The first rank's clock: the others' runs on while they wait for it to save.
        seconds = self.own_seconds() if self.local_rank == 0 else 0.0
        gravest = torch.tensor([verdict, seconds], dtype=torch.float64)
        try:
            dist.all_reduce(gravest, dist.ReduceOp.MAX, self._agreeing)
        except RuntimeError as error:
            if verdict == _GO:
                raise TrainingError("another rank has ended; continue with --c") from error
            return verdict
        self.common_seconds = float(gravest[1])
        return int(gravest[0])

    def _gives_up(self) -> bool:
        """Whether to stop waiting for a batch; with several ranks, the others may be working on it already."""
        return self.asked is not None and not self.is_ddp

    def _save_and_leave(self) -> NoReturn:
        self.save(self._latest, must=True)
        done = f"epoch {self.current_epoch}, {len(self.outputs)} iterations of it"
        self._leave(f"saved at {done}" if not self.disable_checkpointing else "nothing saved (--disable_checkpointing)")

    def _leave(self, what: str) -> NoReturn:
        name = "another rank" if self.asked is None else self.asked.name
        self.print_to_log_file(f"Ended by {name}: {what}. Exit status {REQUEUE}: the same command with --c continues.")
        if self._agreeing is not None:
            with contextlib.suppress(RuntimeError):
                dist.barrier(self._agreeing)  # the first to leave ends the others, and one may still be saving
            leave_at_once()
        raise SystemExit(REQUEUE)

    # ---- saving --------------------------------------------------------------------------------------------------

    @property
    def _latest(self) -> Path:
        return Path(self.output_folder, files.LATEST)

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, but a kill in the middle leaves the earlier file whole, and a full disk costs only this one.

        Raises:
            TrainingError: the final checkpoint cannot be written.
        """
        self.save(Path(filename), must=Path(filename).name not in (files.LATEST, files.BEST))

    def save(self, file: Path, must: bool) -> None:
        """Save on rank 0. A failure is an error if ``must`` is true, else a warning."""
        if file.name == files.LATEST:
            self._saved_at = time.monotonic()
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        try:
            files.write(self._content(), file)
        except TrainingError as error:
            if must:
                raise
            if file.name == files.BEST:
                self._best_ema = None  # the next epoch is saved in its place
            self.print_to_log_file(f"WARNING: {error}. The training continues.")

    def _content(self) -> dict[str, Any]:
        """nnU-Net's own, of the epochs that are done, and what is ours."""
        log = self.logger.get_checkpoint()
        done = len(log["epoch_end_timestamps"])
        return {
            "network_weights": self.network_weights(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": {name: values[:done] for name, values in log.items()},
            "_best_ema": self._best_ema,
            "current_epoch": done,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            _WITHIN: self._within_epoch() if self.outputs else None,
            _OWN: self.own_state(),
        }

    def _within_epoch(self) -> dict[str, Any]:
        seconds = time.time() - self.logger.get_value("epoch_start_timestamps", step=-1)
        columns = {
            name: torch.stack([torch.as_tensor(o[name], device=self.device) for o in self.outputs]).cpu()
            for name in self.outputs[0]
        }
        return {"outputs": columns, "seconds": float(seconds), "rate": float(self.logger.get_value("lrs", step=-1))}

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def network_weights(self) -> Mapping[str, Tensor]:
        """The weights to save."""
        return self.bare_network.state_dict()

    def own_state(self) -> dict[str, Any]:
        """What a class needs beyond nnU-Net's content to continue: tensors and plain values."""
        return {"peak_memory_mib": self._peak_memory_mib()}

    # ---- resuming ------------------------------------------------------------------------------------------------

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue from a checkpoint; if the one that ``--c`` names is damaged, from the newest whole one.

        Raises:
            TrainingError: none is whole, or the very one that validation needs is damaged.
            CheckpointError: it is not one of nnU-Net's, or would run code.
        """
        if not self.was_initialized:
            self.initialize()
        content = filename_or_checkpoint
        if isinstance(content, str):
            content = self._read(Path(content))
        weights = {name.removeprefix("module."): value for name, value in content["network_weights"].items()}
        self.bare_network.load_state_dict(weights)
        # A copy: an optimizer on the CPU would keep working on the memory-mapped file.
        self.optimizer.load_state_dict(copy.deepcopy(content["optimizer_state"]))
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        if "inference_allowed_mirroring_axes" in content:
            self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        within = content.get(_WITHIN) or {"outputs": {}, "seconds": 0.0}
        self._epoch_seconds, self.epoch_rate = within["seconds"], within.get("rate")
        rows = zip(*within["outputs"].values(), strict=True)
        self.outputs = [dict(zip(within["outputs"], (x.numpy() for x in row), strict=True)) for row in rows]
        self.load_own_state(content.get(_OWN) or {})

    def _read(self, file: Path) -> dict[str, Any]:
        resuming = self.logger.resume and self.current_epoch == 0  # --val and --val_best want their very file
        choice = files.candidates(file.parent) if resuming else [file]
        file, content = files.load_whole(choice, self.print_to_log_file)
        within = content.get(_WITHIN)
        part = f", and {len(within['outputs']['loss'])} iterations of the next" if within else ""
        self.print_to_log_file(f"Loaded {file}: {content['current_epoch']} epochs are done{part}.")
        return content

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`; ``state`` is empty for a checkpoint of nnU-Net's own trainer."""
        self._peak_before = float(state.get("peak_memory_mib", 0.0))


def _device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU cores that this process may use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name() if device.type == "cpu" else str(device)


def _peak_resident_mib() -> float:
    """This process's highest resident memory so far; where the system does not tell it, what it holds now."""
    status = Path("/proc/self/status")
    peaks = (
        [x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM:")] if status.is_file() else []
    )
    if peaks:  # ru_maxrss would include the process that started this one
        return int(peaks[0]) / 1024
    memory = psutil.Process().memory_info()
    return (memory.peak_wset if sys.platform == "win32" else memory.rss) / 2**20
