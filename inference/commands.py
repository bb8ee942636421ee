"""Run nnU-Net's own commands in this Python, on folders of the caller's, with a log."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import psutil

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value

from .errors import DemoError

PROCESSES = min(2, os.cpu_count() or 1)
"""Worker processes for planning, preprocessing and export; the demo's data sets are small."""

_POLL_SECONDS = 0.5
_TAIL_LINES = 20


def nnunet_environment(raw: Path, preprocessed: Path, results: Path) -> dict[str, str]:
    """This process's environment with nnU-Net's folders and MaskSAM's trainers.

    Raises:
        DemoError: if the trainers are not installed.
    """
    environment = dict(os.environ)
    # A value of 0, right for training without workers, makes planning fail.
    environment.pop("nnUNet_n_proc_DA", None)
    try:
        trainers = ext_trainer_value(environment.get(EXT_TRAINER))
    except RuntimeError as error:
        raise DemoError(str(error)) from error
    environment |= {
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(preprocessed),
        "nnUNet_results": str(results),
        EXT_TRAINER: trainers,
        "nnUNet_def_n_proc": str(PROCESSES),
        "PYTHONUNBUFFERED": "1",
        "nnUNet_compile": "f",  # compiling would eat into the budget of the method that does it
    }
    return environment


def run_nnunet(
    command: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    poll: Callable[[], None] | None = None,
) -> None:
    """Run one of nnU-Net's console commands to its end.

    Args:
        command: such as ``nnUNetv2_train``.
        arguments: what follows it on the command line.
        environment: the whole environment of the command.
        log: where its output goes; overwritten.
        poll: called about twice a second while it runs.

    Raises:
        DemoError: if the command is unknown or fails, with the log's path and last lines.
    """
    line = shlex.join([command, *arguments])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        stream.write(f"$ {line}\n")
        stream.flush()
        with _termination_as_exit():
            process = subprocess.Popen(
                [sys.executable, "-c", _launcher(command), *arguments],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            try:
                code = _wait(process, poll)
            finally:
                if process.poll() is None:
                    _end(process)
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        raise DemoError(
            f"{line}\nended with exit status {code}. The end of its log, {log}:\n"
            + "\n".join(f"    {x}" for x in lines)
        )


def _wait(process: subprocess.Popen[bytes], poll: Callable[[], None] | None) -> int:
    while True:
        try:
            return process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if poll is not None:
                poll()


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that a command is not left running without us."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _launcher(command: str) -> str:
    """Python code that runs a console command as its script does.

    By entry point, not by script: scripts need not lie beside the interpreter, nor start where its path is long.
    """
    found = entry_points(group="console_scripts", name=command)
    if not found:
        raise DemoError(f"{command} is not installed in {sys.executable}: pip install nnunetv2")
    module, function = next(iter(found)).value.split(":")
    return f"import sys; from {module} import {function} as run; sys.argv[0] = {command!r}; sys.exit(run())"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and the workers it started."""
    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
