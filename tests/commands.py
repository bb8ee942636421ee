"""Console commands, each in a process of its own that is forked from one that has imported nnU-Net and PyTorch.

Imports take longer than most commands do here, and are paid for once. As a script, the prepared process: it reads
requests from stdin, a line of JSON each, and answers with the command's process id, then with its exit status.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any


class Command:
    """A command that runs."""

    def __init__(self, prepared: Prepared, pid: int) -> None:
        self.pid, self._prepared = pid, prepared

    def wait(self) -> int:
        """Its exit status; minus the signal's number where one ended it."""
        return int(self._prepared.answer())


class Prepared:
    """Starts commands, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def start(self, words: Sequence[object], log: Path, environment: Mapping[str, str]) -> Command:
        """Start one of the environment's console commands; its output goes to the end of ``log``."""
        assert self._process.stdin is not None
        request = {"words": [str(word) for word in words], "log": str(log), "environment": dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Command(self, int(self.answer()))

    def answer(self) -> Any:
        """The next line that the prepared process says."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@cache
def prepared() -> Prepared:
    """The prepared process of this test process; it ends with it, as its stdin does."""
    return Prepared()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    os.environ["nnUNet_def_n_proc"] = "1"  # nnU-Net reads it when it is imported
    import torch
    from nnunetv2.run.run_training import run_training  # noqa: F401
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import masksam_nnunet.cli.app  # noqa: F401

    recursive_find_trainer_class_by_name("nnUNetTrainer_1epoch")  # imports all that nnU-Net would at each start
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            stream = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.argv = request["words"]
            torch.set_num_threads(1)
            (entry,) = entry_points(group="console_scripts", name=sys.argv[0])
            sys.exit(entry.load()())
        print(json.dumps(pid), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers, flush=True)


if __name__ == "__main__":  # nnU-Net's worker processes import this file again
    main()
