"""nnU-Net's training loop, made resumable after kills, pre-emption, full disks and damaged files."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from masksam_nnunet.environment import TRAINING_STATS_FILE
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.files import write_json
from masksam_nnunet.stop_signals import REQUEUE, StopSignals, leave_at_once

from . import checkpoint_files as files
from .checkpoint_files import SaveInterval
from .loading import LoaderWatch, forks_end_with_parent
from .training_stats import peak_memory_mib, training_stats

Outputs = list[dict[str, Any]]

_GO, _STOP, _BROKEN = 0, 1, 2
_NEVER = 10**9
_WITHIN, _OWN = "masksam_within_epoch", "masksam_own"
"""In a checkpoint: what was done of the epoch that it was saved in; what the trainer's class adds to nnU-Net's."""


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's loop, which can end after any iteration and continue from there.

    A checkpoint may be saved within an epoch: it then holds the outputs of the epoch's iterations so far, and the
    training continues with the next one. nnU-Net draws its batches at random, so there is no position in the data to
    restore. Writes ``training_stats.json`` into the fold's folder at the end.
    """

    save_default = SaveInterval(epochs=50, minutes=30)

    def __init__(self, *arguments: Any) -> None:
        interval = SaveInterval.chosen(self.save_default)
        super().__init__(*arguments)
        self.save_every = interval.epochs or _NEVER
        self.save_minutes = interval.minutes
        self.stop = StopSignals()
        self.logger.plot_progress_png = partial(self._plot, self.logger.plot_progress_png)
        self._was_loaded = self._latest_is_whole = False
        self._within: dict[str, Any] | None = None  # the part of an epoch that is saved, or was loaded
        self._saved_at = 0.0
        self._peak_before = 0.0  # MiB, of the processes before this one
        self._agreeing: Any = None

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run_training(self) -> None:
        """nnU-Net's own loop.

        Raises:
            SystemExit: with status 75, after a signal; the training is saved.
            TrainingError: the training cannot continue.
        """
        with self.stop.handled():
            self._resume_from_previous()
            with forks_end_with_parent():
                self.on_train_start()
            if self.local_rank == 0:
                files.remove_partial(self._folder)
            if self.is_ddp:
                self._agreeing = dist.new_group(backend="gloo")  # between hosts: no device has to be waited for
            train, validation = (LoaderWatch(x, self._gives_up) for x in (self.dataloader_train, self.dataloader_val))
            try:
                with self.stop.gentle():
                    self._saved_at = time.monotonic()
                    self.on_loop_start()
                    while self.training_goes_on():
                        self.run_epoch(train, validation)
                    self.on_train_end()
                    if self.stop.asked is not None:
                        self._leave("the training is done; its validation is not, and starts with --val or --c")
            finally:
                train.end()
                validation.end()

    def run_epoch(self, train: LoaderWatch, validation: LoaderWatch) -> None:
        """One epoch, or the rest of the one that the checkpoint was saved in."""
        outputs = self._outputs_so_far()
        self.on_epoch_start()
        self._within = None
        self.on_train_epoch_start()
        while self.epoch_goes_on(len(outputs)):
            outputs.append(self.train_step(self._next_batch(train, outputs)))
            self._save_or_stop(outputs)
        self.on_train_epoch_end(outputs)
        self._validate(validation, outputs)
        self.on_epoch_end()

    def _validate(self, loader: LoaderWatch, outputs: Outputs) -> None:
        """nnU-Net's validation on patches, after the epoch's training with these ``outputs``."""
        with torch.no_grad():
            self.on_validation_epoch_start()
            validated: Outputs = []
            while self.validation_goes_on(len(validated)):
                validated.append(self.validation_step(self._next_batch(loader, outputs)))
                self._save_or_stop(outputs)
            self.on_validation_epoch_end(validated)

    def _next_batch(self, loader: LoaderWatch, outputs: Outputs) -> dict[str, Any]:
        try:
            batch = loader.next_batch()
        except TrainingError as error:
            self._save_within(outputs, must=False)
            raise TrainingError(f"{error}. Continue from the saved checkpoint with --c") from error
        if batch is None:
            self._save_and_leave(outputs)
        return batch

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

    def trouble(self) -> str | None:
        """Why the training cannot continue; asked after each iteration. One rank may know it before the others."""
        return None

    def on_epoch_start(self) -> None:
        if self._within is None:
            super().on_epoch_start()
        else:  # the time between the two parts of the epoch does not count
            self.logger.log("epoch_start_timestamps", time.time() - self._within["seconds"], self.current_epoch)

    def on_train_end(self) -> None:
        if self.local_rank == 0:
            self.write_beside_checkpoints(TRAINING_STATS_FILE, self.training_stats())
        super().on_train_end()
        if self.local_rank == 0:  # nnU-Net has removed the latest
            (self._folder / files.PREVIOUS).unlink(missing_ok=True)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's own. A signal ends it at once with status 75: it always starts from its first case."""
        with self.stop.handled():
            super().perform_actual_validation(save_probabilities)

    @property
    def _folder(self) -> Path:
        return Path(self.output_folder)

    def _plot(self, plot: Callable[[str], None], folder: str) -> None:
        """nnU-Net's own; a full disk does not end the training."""
        try:
            plot(folder)
        except OSError as error:
            self.print_to_log_file(f"WARNING: progress.png could not be written: {error}")

    def training_stats(self) -> dict[str, Any]:
        """The content of ``training_stats.json``."""
        return training_stats(self, self.peak_memory_mib())

    def peak_memory_mib(self) -> float:
        """Highest memory so far, in the processes before a resumption too."""
        return max(self._peak_before, peak_memory_mib(self.device))

    def write_beside_checkpoints(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file into the fold's folder; a full disk does not end the training."""
        try:
            write_json(self._folder / name, content)
        except OSError as error:
            self.print_to_log_file(f"WARNING: {name} could not be written: {error}")

    # ---- ending early --------------------------------------------------------------------------------------------

    def _save_or_stop(self, outputs: Outputs) -> None:
        """After each iteration, save if it is time to, and end the training if it has to end."""
        trouble = self.trouble()
        verdict = self._agreed(_BROKEN if trouble else _STOP if self.stop.asked is not None else _GO)
        if verdict == _BROKEN:
            raise TrainingError(trouble or "another rank cannot continue; its log says why")
        if verdict == _STOP:
            self._save_and_leave(outputs)
        if self.save_minutes is not None and time.monotonic() - self._saved_at > 60 * self.save_minutes:
            self._save_within(outputs, must=False)

    def _agreed(self, verdict: int) -> int:
        """The gravest verdict of all ranks: they must leave after the same iteration, or one waits for the other."""
        if self._agreeing is None:
            return verdict
        gravest = torch.tensor(verdict)
        try:
            dist.all_reduce(gravest, dist.ReduceOp.MAX, self._agreeing)
        except RuntimeError as error:
            if verdict == _GO:
                raise TrainingError("another rank has ended; continue with --c") from error
            return verdict
        return int(gravest)

    def _gives_up(self) -> bool:
        """Whether to stop waiting for a batch; with several ranks, the others may be working on it already."""
        return self.stop.asked is not None and not self.is_ddp

    def _save_and_leave(self, outputs: Outputs) -> NoReturn:
        self._save_within(outputs, must=True)
        done = f"epoch {self.current_epoch}, {len(outputs)} iterations of it"
        self._leave(f"saved at {done}" if not self.disable_checkpointing else "nothing saved (--disable_checkpointing)")

    def _leave(self, what: str) -> NoReturn:
        name = "another rank" if self.stop.asked is None else self.stop.asked.name
        self.print_to_log_file(f"Ended by {name}: {what}. Exit status {REQUEUE}: the same command with --c continues.")
        if self._agreeing is not None:
            with contextlib.suppress(RuntimeError):
                dist.barrier(self._agreeing)  # the first to leave ends the others, and one may still be saving
            leave_at_once()
        raise SystemExit(REQUEUE)

    # ---- saving --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, but a kill in the middle leaves the earlier file whole, and a full disk costs only this one.

        Raises:
            TrainingError: the final checkpoint cannot be written.
        """
        self.save(Path(filename), must=Path(filename).name not in (files.LATEST, files.BEST))

    def save(self, file: Path, must: bool) -> None:
        """Save on rank 0. A failure is an error if ``must`` is true, else a warning."""
        latest = file.name == files.LATEST
        if latest:
            self._saved_at = time.monotonic()
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        previous = file.with_name(files.PREVIOUS)
        keep = latest and self._latest_is_whole
        try:
            try:
                files.write(self._content(), file, previous if keep else None)
            except TrainingError:
                if not (must and self._latest_is_whole and previous.is_file()):
                    raise
                previous.unlink()  # room for one more; the latest is whole
                files.write(self._content(), file)
        except TrainingError as error:
            if must:
                raise
            self.print_to_log_file(f"WARNING: {error}. The training continues.")
            return
        if latest:
            if not self._was_loaded and not self._latest_is_whole:
                previous.unlink(missing_ok=True)  # another training's
            self._latest_is_whole = True

    def _save_within(self, outputs: Outputs, must: bool) -> None:
        """The latest checkpoint, within the current epoch."""
        self._within = self._part(outputs) if outputs else None
        self.current_epoch -= 1  # what is saved is one more than this
        try:
            self.save(self._folder / files.LATEST, must)
        finally:
            self.current_epoch += 1
            self._within = None

    def _part(self, outputs: Outputs) -> dict[str, Any]:
        seconds = time.time() - self.logger.get_value("epoch_start_timestamps", step=-1)
        columns = {name: torch.stack([torch.as_tensor(o[name]) for o in outputs]).cpu() for name in outputs[0]}
        return {"outputs": columns, "seconds": float(seconds)}

    def _content(self) -> dict[str, Any]:
        """nnU-Net's own, of the epochs that are done, and what is ours."""
        done = self.current_epoch + 1
        return {
            "network_weights": self.network_weights(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": {name: values[:done] for name, values in self.logger.get_checkpoint().items()},
            "_best_ema": self._best_ema,
            "current_epoch": done,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            _WITHIN: self._within,
            _OWN: self.own_state(),
        }

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        bare: nn.Module = network._orig_mod if isinstance(network, OptimizedModule) else network
        return bare

    def network_weights(self) -> Mapping[str, Tensor]:
        """The weights to save."""
        return self.bare_network.state_dict()

    def own_state(self) -> dict[str, Any]:
        """What a class needs beyond nnU-Net's content to continue: tensors and plain values."""
        return {"peak_memory_mib": self.peak_memory_mib()}

    # ---- resuming ------------------------------------------------------------------------------------------------

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue from a checkpoint; if the one that ``--c`` names is damaged, from the newest whole one.

        Raises:
            TrainingError: none is whole, or the very one that validation needs is damaged.
            CheckpointError: it is not one of nnU-Net's, or would run code.
        """
        if not self.was_initialized:
            self.initialize()
        resuming = self.logger.resume and not self._was_loaded  # --val and --val_best want their very file
        self._was_loaded = True
        if not isinstance(filename_or_checkpoint, str):
            self._take_over(filename_or_checkpoint)
            return
        file = Path(filename_or_checkpoint)
        if not resuming or file.name not in files.ORDER:
            self._take_over(files.exactly(file))
            return
        found = files.newest_whole(file.parent)
        for line in found.damaged:
            self.print_to_log_file(line)
        self._take_over(found.content)
        self._latest_is_whole = found.file.name == files.LATEST
        within = "" if self._within is None else f", and {self.done_of_epoch} iterations of the next"
        self.print_to_log_file(f"Continuing from {found.file}: {self.current_epoch} epochs are done{within}.")

    def _resume_from_previous(self) -> None:
        """Used where ``--c`` found none of the names that nnU-Net knows, and would start from epoch 0."""
        if self.logger.resume and not self._was_loaded and (self._folder / files.PREVIOUS).is_file():
            self.load_checkpoint(str(self._folder / files.PREVIOUS))

    def _take_over(self, content: Mapping[str, Any]) -> None:
        self.bare_network.load_state_dict(_without_module(content["network_weights"]))
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
        self._within = content.get(_WITHIN)
        self.load_own_state(content.get(_OWN) or {})

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`; ``state`` is empty for a checkpoint of nnU-Net's own trainer."""
        self._peak_before = float(state.get("peak_memory_mib", 0.0))

    @property
    def done_of_epoch(self) -> int:
        """Iterations of the current epoch that the checkpoint holds, before the loop has started."""
        return 0 if self._within is None else len(next(iter(self._within["outputs"].values())))

    def _outputs_so_far(self) -> Outputs:
        """The outputs of the current epoch's iterations before the checkpoint."""
        if self._within is None:
            return []
        columns = self._within["outputs"]
        return [self.restored({name: values[i] for name, values in columns.items()}) for i in range(self.done_of_epoch)]

    def restored(self, outputs: dict[str, Tensor]) -> dict[str, Any]:
        """Outputs of an iteration as ``train_step`` gives them."""
        return {name: value.numpy() for name, value in outputs.items()}


def _without_module(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as a bare network has them."""
    return {name.removeprefix("module."): value for name, value in weights.items()}
