"""What a result was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("masksam-nnunet", "nnunetv2", "torch", "monai", "numpy", "SimpleITK", "nibabel", "scipy", "pandas")


def versions() -> dict[str, str]:
    """Of Python and of what matters here, by name."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def git_hash() -> str | None:
    """The commit of this package's checkout, with ``+changes`` where files differ; None for an installed one."""
    folder = Path(__file__).resolve().parent
    try:
        # The checkout must be this package's own, not one that an environment happens to lie in.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, check=True, capture_output=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
