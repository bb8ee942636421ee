"""The container's entry point as the platform runs it, without a container engine.

A mount namespace with a read-only root, fresh ``/tmp`` and a small ``/dev/shm``, input and model read-only; a network
namespace without any network; a user without a name, capabilities or home, in an empty environment. Tests that need
this are skipped where the system has no ``unshare`` or forbids it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER = 54321  # one that no system has
MODULE = "masksam_nnunet.inference.docker"
_END = "--- left behind:"


def namespaces() -> bool:
    """Whether we may have namespaces of our own."""
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        return False
    probe = ["unshare", *_as_root(), "--mount", "--net", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def run_contained(
    source: Path, output: Path, model: Path, *options: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the entry point; ``output`` is made writable for its user. How it ended, and what is in /tmp afterwards."""
    if not namespaces():
        pytest.skip("this system has no namespaces for us")
    output.mkdir(exist_ok=True)
    output.chmod(0o777)
    places = ["--input", "/mnt/input", "--output", "/mnt/output", "--model", "/mnt/model"]
    command = shlex.join([sys.executable, "-m", MODULE, *places, *options])
    # Python, packages and checkout stay where they are, even below folders that others may not enter.
    needed = sorted({Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT})
    needed = [path for path in needed if not any(other in path.parents for other in needed)]
    covers = {path: cover for path in needed if (cover := _closed_folder(path))}
    lines = ["set -eu", "mount -t tmpfs -o mode=755 tmpfs /mnt"]
    for name, folder in (("input", source), ("output", output), ("model", model)):
        lines += [f"mkdir /mnt/{name}", f"mount --bind {shlex.quote(str(folder))} /mnt/{name}"]
        lines += [f"mount -o remount,bind,ro /mnt/{name}"] if name != "output" else []
    for number, path in enumerate(covers):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(path))} /mnt/{number}"]
    lines += ["mount -t tmpfs -o mode=1777 tmpfs /tmp"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(c)}" for c in sorted({*covers.values()} - {"/tmp"})]
    for number, path in enumerate(covers):
        place = shlex.quote(str(path))
        lines += [f"mkdir -p {place}", f"mount --bind /mnt/{number} {place}", f"mount -o remount,bind,ro {place}"]
    lines += [f"mount -o remount,ro {shlex.quote(c)}" for c in sorted({*covers.values()} - {"/tmp"})]
    lines += [
        "mount -t tmpfs -o mode=1777,size=64m tmpfs /dev/shm",
        "mount -o remount,ro /mnt",
        "mount -o remount,bind,ro /",
        "cd /tmp",
        "set +e",
        f"setpriv {_drop()} env -i PATH=/usr/bin:/bin OMP_NUM_THREADS=1 {command}",
        "code=$?",
        f"echo '{_END}'",
        f"ls -A /tmp /dev/shm | grep -v -e ':$' -e '^$' {''.join(_not_ours(covers))}",
        "exit $code",
    ]
    unshare = ["unshare", *_as_root(), "--mount", "--net", "sh", "-c", "\n".join(lines)]
    done = subprocess.run(unshare, capture_output=True, text=True, timeout=300)
    return done, done.stdout.partition(_END)[2].strip()


def _as_root() -> list[str]:
    return [] if os.geteuid() == 0 else ["--map-root-user"]


def _drop() -> str:
    user = f"--reuid {USER} --regid {USER} --clear-groups " if os.geteuid() == 0 else ""
    return f"{user}--bounding-set -all --inh-caps -all --no-new-privs"


def _closed_folder(path: Path) -> str:
    """The folder above ``path`` that must be covered so that another user reaches it; empty if none."""
    if path.is_relative_to("/tmp"):
        return "/tmp"
    closed = [folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001]
    return str(closed[0]) if closed else ""


def _not_ours(covers: dict[Path, str]) -> list[str]:
    """Options of grep for what was put into /tmp so that Python runs."""
    return [f" -e {shlex.quote('^' + path.parts[2] + '$')}" for path, cover in covers.items() if cover == "/tmp"]
