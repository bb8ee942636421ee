"""Run nnU-Net's own commands in this Python, on folders of the caller's, with a log."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import psutil

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.errors import DemoError

PROCESSES = min(2, os.cpu_count() or 1)
"""Worker processes for planning, preprocessing and export; the demo's data sets are small."""

SAVE_SECONDS = 30.0
"""What a training has to write a checkpoint before it is killed; SLURM itself gives 30 to 90."""

_POLL_SECONDS = 0.5
_TAIL_LINES = 20


class CommandError(DemoError):
    """A command failed; its message ends with the end of its log.

    Attributes:
        code: its exit status; minus the signal's number where a signal ended it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


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
    words = [sys.executable, "-c", _launcher(command), *arguments]
    log.unlink(missing_ok=True)
    run_logged(shlex.join([command, *arguments]), words, environment, log, poll)


def run_logged(
    line: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    poll: Callable[[], None] | None = None,
    shielded_from: Collection[signal.Signals] = (),
    catch_sigterm: bool = True,
    end_with: signal.Signals = signal.SIGTERM,
) -> None:
    """Run a program to its end, with its output at the end of a log.

    Args:
        line: the command as people would type it.
        words: what is run.
        environment: the whole environment of the program.
        log: where its output goes, after what is there.
        poll: called about twice a second while it runs.
        shielded_from: signals that the program and what it starts shall not get; they are for this process alone.
        catch_sigterm: end the program when this process gets SIGTERM; else leave that signal to who handles it.
        end_with: what the program gets first, and alone, when it has to end; it has :data:`SAVE_SECONDS` to save.

    Raises:
        CommandError: if the program fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {line}\n")
        stream.flush()
        with termination_as_exit() if catch_sigterm else contextlib.nullcontext():
            with blocked(shielded_from):  # a blocked signal stays blocked in the child
                process = subprocess.Popen(
                    list(words),
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            try:
                code = _wait(process, poll)
            finally:
                if process.poll() is None:
                    _end(process, end_with)
    if code != 0:
        raise CommandError(
            f"{line}\nended with exit status {code}. The end of its log, {log}:\n"
            + "\n".join(f"    {x}" for x in last_lines(log)),
            code,
        )


def last_lines(log: Path, number: int = _TAIL_LINES) -> list[str]:
    """The end of a log; nothing where there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-number:]
    except OSError:
        return []


@contextlib.contextmanager
def blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """While it lasts, these signals wait; in processes that are started meanwhile they do so for good."""
    if not signals:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(process: subprocess.Popen[bytes], poll: Callable[[], None] | None) -> int:
    while True:
        try:
            return process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if poll is not None:
                poll()


@contextlib.contextmanager
def termination_as_exit() -> Iterator[None]:
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


def _end(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    """End a command, then the workers it started, which it may need to the end."""
    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    process.send_signal(first)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SAVE_SECONDS)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    kill_after(family, 5)


def kill_after(family: Sequence[psutil.Process], seconds: float) -> None:
    """Wait for processes to end, then kill those that have not. Zombies have: they only wait for their parent."""
    deadline = time.monotonic() + seconds
    while (alive := [member for member in family if _is_alive(member)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
