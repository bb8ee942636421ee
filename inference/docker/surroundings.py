"""The one folder beside the output that is written: libraries keep caches, settings and temporary files there.

Nothing heavy is imported: variables count only if they are set before the libraries are.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value

from .errors import OutputError

_HOMES = {
    "HOME": "home",
    "TMPDIR": "tmp",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "MPLCONFIGDIR": "matplotlib",
    "NUMBA_CACHE_DIR": "numba",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "nnUNet_raw": "nnUNet_raw",
    "nnUNet_preprocessed": "nnUNet_preprocessed",
    "nnUNet_results": "nnUNet_results",
}


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder below ``parent``, removed at the end, with the libraries' folders in it; variables say so.

    Raises:
        OutputError: ``parent`` cannot be written to.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="masksam-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(
            f"--scratch {parent}: cannot make a folder there ({error.strerror}); give a writable one, or mount one: "
            "--tmpfs /tmp"
        ) from error
    with made as name:
        folder = Path(name)
        for variable, below in _HOMES.items():
            (folder / below).mkdir()
            os.environ[variable] = str(folder / below)
        os.environ.setdefault("USER", "algorithm")  # users that have a number only have no name to be looked up
        os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))
        # The machine may have more processors than the container may use.
        os.environ.setdefault("nnUNet_def_n_proc", str(min(8, len(os.sched_getaffinity(0)))))
        os.environ["nnUNet_compile"] = "f"  # needs a compiler, and minutes
        sys.dont_write_bytecode = True
        yield folder
