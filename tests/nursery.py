"""Trainings by nnU-Net's own ``run_training``, each in a process of its own that is forked from a prepared one.

Imports take longer than the trainings here, and are paid for once. As a script, the prepared process: it reads
requests from stdin, a line of JSON each, and answers with the process's id, then with how it ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class Nursery:
    """Starts trainings, one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def start(self, log: Path, environment: Mapping[str, str], **options: Any) -> int:
        """Start ``run_training`` with these options, on the CPU, its output at the end of ``log``; the process's id.

        :meth:`answer` then waits for its exit status, which is minus the signal's number where one ended it.
        """
        assert self._process.stdin is not None
        request = {"log": str(log), "environment": dict(environment), "options": options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        """The next line that the prepared process says."""
        assert self._process.stdout is not None
        return int(json.loads(self._process.stdout.readline()))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    import torch
    from nnunetv2.run.run_training import run_training
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    recursive_find_trainer_class_by_name("MaskSAMTrainer")  # imports all that nnU-Net would at each start
    print(0, file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            stream = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ.update(request["environment"])
            torch.set_num_threads(1)
            run_training(**request["options"], device=torch.device("cpu"))
            return
        print(json.dumps(pid), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers, flush=True)


if __name__ == "__main__":
    main()
