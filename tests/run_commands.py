"""Run several of the environment's console commands one after another in one process: imports are paid for once.

    python run_commands.py '[["nnUNetv2_train", "4", "3d_fullres", "0"], ...]'

Each is run by its entry point with its own ``sys.argv``, as its script does; the first that fails ends all.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points


def main() -> None:
    for command, *arguments in json.loads(sys.argv[1]):
        print(f"$ {command} {' '.join(arguments)}", flush=True)
        # 0 is right for training without workers, but makes planning fail.
        os.environ.pop("nnUNet_n_proc_DA", None)
        if command == "nnUNetv2_train" or [command, *arguments[:1]] == ["masksam", "train"]:
            os.environ["nnUNet_n_proc_DA"] = "0"
        (entry,) = entry_points(group="console_scripts", name=command)
        before, sys.argv = sys.argv, [command, *arguments]
        try:
            entry.load()()
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.argv = before


if __name__ == "__main__":  # worker processes import this file again
    main()
