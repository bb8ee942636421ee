"""The container's entry point as the platform runs it, without a container engine.

Read-only root, input and model; a small ``/dev/shm``; no network; a user without a name, capabilities or home, in an
empty environment. Tests that need this are skipped where the system has no ``unshare`` or forbids namespaces.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = "masksam_nnunet.inference.docker"
_OUTER = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount", "--net"]
_INNER = "unshare --user --map-user=54321 --map-group=54321"  # whom no system has
_END = "--- left behind:"


def run_contained(
    source: Path, output: Path, model: Path, *options: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the entry point. How it ended, and what is in its folder for temporary files afterwards."""
    probe = f"mount -t tmpfs tmpfs /mnt && {_INNER} true"
    if not shutil.which("unshare") or subprocess.run([*_OUTER, "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("this system has no namespaces for us")
    output.mkdir(exist_ok=True)
    places = ["--input", "/mnt/input", "--output", "/mnt/output", "--model", "/mnt/model", "--scratch", "/mnt/tmp"]
    command = shlex.join([sys.executable, "-m", MODULE, *places, *options])
    lines = ["set -eu", "mount -t tmpfs tmpfs /mnt", "mkdir /mnt/input /mnt/output /mnt/model /mnt/tmp"]
    for name, folder in (("input", source), ("output", output), ("model", model)):
        lines.append(f"mount --bind {shlex.quote(str(folder))} /mnt/{name}")
        lines += [f"mount -o remount,bind,ro /mnt/{name}"] if name != "output" else []
    lines += [
        "mount -t tmpfs -o mode=1777,size=64m tmpfs /dev/shm",
        "mount -o remount,bind,ro /",
        "cd /mnt/tmp",
        "set +e",
        f"{_INNER} env -i PATH=/usr/bin:/bin TMPDIR=/mnt/tmp OMP_NUM_THREADS=1 {command}",
        "code=$?",
        f"echo '{_END}'",
        "ls -A /mnt/tmp /dev/shm | grep -v -e ':$' -e '^$'",
        "exit $code",
    ]
    done = subprocess.run([*_OUTER, "sh", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    return done, done.stdout.partition(_END)[2].strip()
