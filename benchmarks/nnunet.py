"""Run nnU-Net's own commands as subprocesses that end with this process.

    python -m masksam_nnunet.benchmarks.nnunet COMMAND ARGUMENT...

runs one of nnU-Net's console commands. Its standard input is a pipe whose other end only the parent holds. When the
parent ends, however it ends, the pipe closes, and the command kills its process group: itself and nnU-Net's workers.
"""

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

from masksam_nnunet.errors import TrainingError, UsageError

SAVE_SECONDS = 30.0  # for a training to write a checkpoint before it is killed; SLURM itself gives 30 to 90
_POLL_SECONDS = 0.5
_TAIL_LINES = 20


def run_nnunet(command: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run one of nnU-Net's console commands as :func:`run_to_end`, with its output in a new log.

    Raises:
        TrainingError: the command fails; with the end of its log.
    """
    log.unlink(missing_ok=True)
    if status := run_to_end(command, arguments, environment, log):
        raise TrainingError(failed(shlex.join([command, *arguments]), status, log))


def run_to_end(
    command: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    stop: threading.Event | None = None,
    look: Callable[[int], None] | None = None,
) -> int:
    """Run one of nnU-Net's console commands and return its exit status, minus the signal's number after a signal.

    An exception in this thread, such as KeyboardInterrupt, ends the command too: it has :data:`SAVE_SECONDS` to save.

    Args:
        command, arguments: such as ``nnUNetv2_train``, and what follows it on the command line.
        environment: the whole environment of the command.
        log: its output is appended.
        stop: ends the command when it is set.
        look: called with the process's number about twice a second.

    Raises:
        UsageError: nnU-Net is not installed.
    """
    if not entry_points(group="console_scripts", name=command):
        raise UsageError(f"{command} is not installed in {sys.executable}: pip install nnunetv2")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join([command, *arguments])}\n")
        stream.flush()
        process = _start([sys.executable, "-P", "-m", __name__, command, *arguments], environment, stream.fileno())
        try:
            while process.poll() is None and not (stop is not None and stop.is_set()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                if look is not None:
                    look(process.pid)
        finally:
            _end(process)
    return process.returncode


def failed(line: str, status: int, log: Path) -> str:
    """The message for a command that ended with an error status."""
    end = "\n    ".join(last_lines(log))
    return f"{line}\nended with exit status {status}. The end of its log, {log}:\n    {end}"


def last_lines(log: Path) -> list[str]:
    """The end of a log; empty where there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return []


@contextlib.contextmanager
def termination_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that trainings can save before this process ends."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # Python leaves handlers to the main thread
        numbers = []
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(words: Sequence[str], environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    # submitit's signal goes to every process of a SLURM job, but only submitit acts on it: the command has it blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        return subprocess.Popen(
            words,
            env=dict(environment),
            stdin=subprocess.PIPE,  # stays open as long as this process lives
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all its workers."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)  # MaskSAM's trainers save and exit, all else ends at once
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)
    with contextlib.suppress(OSError):  # nobody is left in its group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent's end of the pipe is closed
    os.killpg(0, signal.SIGKILL)


def main(command: str, *arguments: str) -> None:
    """Run a console command as its script does."""
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()
    (entry,) = entry_points(group="console_scripts", name=command)
    run = entry.load()
    sys.argv = [command, *arguments]
    sys.exit(run())


if __name__ == "__main__":  # nnU-Net's worker processes import this module again
    main(*sys.argv[1:])
