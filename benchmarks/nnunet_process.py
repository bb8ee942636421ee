"""Run one of nnU-Net's commands in this process, and tell a file what it takes.

    python -m masksam_nnunet.benchmarks.nnunet_process FILE PARENT COMMAND ARGUMENT...

FILE is written every few seconds, so that a process that is killed has told of itself too. A process whose PARENT
(its process id) is gone ends itself: nobody would wait for it, and the fold would be trained a second time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from masksam_nnunet.files import write_json

LOOK_SECONDS = 0.5
WRITE_SECONDS = 3.0


class Witness(threading.Thread):
    """Writes what the process takes, and ends it when its parent is gone."""

    def __init__(self, file: Path, parent: int) -> None:
        super().__init__(daemon=True, name="witness")
        self.file = file
        self.parent = parent
        self.trainer: Any = None
        self._of_training: dict[str, Any] | None = None
        self._over = threading.Event()
        self._since = time.monotonic()

    def run(self) -> None:
        waited = 0.0
        while not self._over.wait(LOOK_SECONDS):
            if os.getppid() != self.parent:
                _end_all()
            waited += LOOK_SECONDS
            if waited >= WRITE_SECONDS:
                waited = 0.0
                self.write()

    def finish(self) -> None:
        """Write a last time."""
        self._over.set()
        self.join()
        self.write()

    def watch(self, trainer: Any) -> None:
        """From now on tell of this trainer; its figures stay as they are when its validation begins."""
        validate: Callable[..., Any] = trainer.perform_actual_validation

        def validate_after_a_look(*arguments: Any, **options: Any) -> Any:
            with contextlib.suppress(Exception):  # a witness must not end what it looks at
                self._of_training = self._measure()
            return validate(*arguments, **options)

        trainer.perform_actual_validation = validate_after_a_look
        self.trainer = trainer
        self._since = time.monotonic()

    def write(self) -> None:
        """Write the file, if there is something to tell."""
        # The disk may be full, and the trainer is at work while this thread looks at it.
        with contextlib.suppress(OSError, ValueError, RuntimeError, KeyError, AttributeError):
            content = self._of_training or self._measure()
            if content:
                write_json(self.file, content)

    def _measure(self) -> dict[str, Any]:
        trainer = self.trainer
        if trainer is None or trainer.network is None:
            return {}
        from masksam_nnunet.trainers.training_stats import peak_memory_mib  # after nnU-Net's own imports

        parameters = list(trainer.network.parameters())
        log = trainer.logger.get_checkpoint()
        ends = list(log["epoch_end_timestamps"])
        starts = list(log["epoch_start_timestamps"])[: len(ends)]
        return {
            "device": _device_name(trainer.device),
            "peak_memory_mib": peak_memory_mib(trainer.device),
            "peak_memory_of": "GPU allocations" if trainer.device.type == "cuda" else "process, resident",
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "epochs": len(ends),
            "epochs_planned": trainer.num_epochs,
            "epoch_seconds": float(sum(end - start for start, end in zip(starts, ends, strict=True))),
            "iterations_per_epoch": trainer.num_iterations_per_epoch,
            "wall_seconds": time.monotonic() - self._since,
        }


def main(arguments: list[str]) -> None:
    """Run the command line described above."""
    file, parent, command, *rest = arguments
    (entry,) = entry_points(group="console_scripts", name=command)
    run = entry.load()
    witness = Witness(Path(file), int(parent))
    _tell_of_trainers(witness)
    witness.start()
    sys.argv = [command, *rest]
    try:
        run()
    finally:
        witness.finish()


def _tell_of_trainers(witness: Witness) -> None:
    """Show the witness each trainer that nnU-Net's command makes."""
    from nnunetv2.run import run_training

    make = run_training.get_trainer_from_args

    def make_and_tell(*arguments: Any, **options: Any) -> Any:
        trainer = make(*arguments, **options)
        witness.watch(trainer)
        return trainer

    run_training.get_trainer_from_args = make_and_tell


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores"


def _end_all() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


if __name__ == "__main__":  # nnU-Net's worker processes import this file again
    main(sys.argv[1:])
