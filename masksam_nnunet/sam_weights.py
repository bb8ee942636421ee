"""SAM's published checkpoints: find, fetch and verify them.

Environment variables, so that the same commands work on a cluster without network access:

- ``MASKSAM_WEIGHTS``: a checkpoint file, or a folder that holds published files.
- ``MASKSAM_WEIGHTS_SHA256``: the hash of a fine-tuned checkpoint, or ``skip``.
- ``MASKSAM_WEIGHTS_URL``: a mirror, either the file's address or, ending in "/", its folder's.
- ``MASKSAM_CACHE``: the folder for fetched files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from .backbones import BACKBONES
from .download import cache_dir, fetch_verified
from .errors import WeightsError
from .files import atomic_write
from .sam_files import CHECKPOINTS, Checkpoint


def find(name: str) -> Path:
    """A checkpoint on this machine: the one that MASKSAM_WEIGHTS names, the cached one, or an installed package's.

    It is not opened: ``MaskSAM.load_sam`` verifies it.

    Args:
        name: a published checkpoint, or a backbone that starts from one.

    Raises:
        WeightsError: there is none, or the variable names nothing.
    """
    checkpoint = released(name)
    path, looked_at = _look_for(checkpoint)
    if path is not None:
        return path
    installed = f"; or install {checkpoint.package}" if checkpoint.package else ""
    raise WeightsError(
        f"no SAM checkpoint for {name}: looked for {looked_at}; fetch it with: masksam weights {name}{installed}; or "
        "set MASKSAM_WEIGHTS to a file that you have; or set MASKSAM_RANDOM_INIT=1 to train without SAM's weights"
    )


def find_exact(name: str, sha256: str) -> Path:
    """The checkpoint that a lean checkpoint was trained with, known by its hash in hex.

    The places are those of ``find``; MASKSAM_WEIGHTS_SHA256 is not consulted.

    Raises:
        WeightsError: there is none, or it is another file.
    """
    checkpoint = identified(sha256)
    path, looked_at = _look_for(checkpoint or released(name))
    received = "" if path is None else _sha256(path)
    if path is not None and received == sha256:
        return path
    seen = f"looked for {looked_at}" if path is None else f"found {path} with {received}"
    fetched = f"fetch it with: masksam weights {checkpoint.name}; or " if checkpoint else ""
    raise WeightsError(
        f"this lean checkpoint needs the {name} file with SHA-256 {sha256}, but {seen}; {fetched}set "
        "MASKSAM_WEIGHTS to that file; or use a model made with masksam export, which needs none"
    )


def verify(path: Path, name: str) -> str:
    """The SHA-256 of ``path`` in hex, once it is known to be an expected one.

    Expected is what MASKSAM_WEIGHTS_SHA256 says (``skip`` expects nothing), else the hash of any published file with
    the architecture and intensities of ``name``, or the one that ``fetch`` recorded beside the file.

    Raises:
        WeightsError: another hash, or the file cannot be read.
    """
    named = os.environ.get("MASKSAM_WEIGHTS_SHA256", "").strip().lower()
    if named not in ("", "skip") and not re.fullmatch("[0-9a-f]{64}", named):
        raise WeightsError(f"MASKSAM_WEIGHTS_SHA256={named} is neither 64 hexadecimal digits nor 'skip'")
    received, checkpoint = _sha256(path), released(name)
    wanted = checkpoint.encoder, checkpoint.intensities
    fitting = {x.sha256 for x in CHECKPOINTS.values() if (x.encoder, x.intensities) == wanted}
    if named == "skip" or received in ({named} if named else fitting | {_recorded(path)}):
        return received
    raise _wrong(path, named or checkpoint.sha256, received)


def fetch(
    name: str,
    *,
    url: str | None = None,
    source: Path | None = None,
    force: bool = False,
    try_out: Callable[[Path, str], None] | None = None,
) -> Path:
    """Bring a published checkpoint into the cache, unless it is there and sound, or in an installed package; its place.

    Args:
        name: a published checkpoint, or a backbone that starts from one.
        url: another address than $MASKSAM_WEIGHTS_URL or the publisher's; ending in "/", the folder with the file.
        source, force: as in ``fetch_verified``.
        try_out: raises WeightsError unless a file of no published hash fits a backbone. The hash of one that does is
            recorded beside the file.

    Raises:
        WeightsError: unknown name, no connection, wrong hash, or the cache cannot be written.
    """
    checkpoint = released(name)
    for path in () if force or source else _packaged(checkpoint):
        if _sha256(path) == checkpoint.sha256:
            return path

    def check(path: Path, origin: str) -> None:
        if checkpoint.sha256 is not None and (received := _sha256(path)) != checkpoint.sha256:
            raise _wrong(origin, checkpoint.sha256, received)
        if checkpoint.sha256 is None and try_out is not None:
            try_out(path, checkpoint.encoder)

    address = url or os.environ.get("MASKSAM_WEIGHTS_URL") or checkpoint.url
    path = fetch_verified(checkpoint.file_name, address, check, WeightsError, source=source, force=force)
    if checkpoint.sha256 is None:
        with atomic_write(_record(path)) as draft:
            draft.write_text(f"{_sha256(path)}  {path.name}\n")
    return path


def located(checkpoint: Checkpoint) -> Path | None:
    """Where a published file is on this machine, by its name; its content is not read."""
    try:
        path, _ = _look_for(checkpoint)
    except WeightsError:
        return None
    return path if path is not None and path.name == checkpoint.file_name else None


def identified(sha256: str | None) -> Checkpoint | None:
    """The published checkpoint with this hash in hex, or the one that ``fetch`` recorded with it."""
    if sha256 is None:
        return None
    known = (x for x in CHECKPOINTS.values() if sha256 == (x.sha256 or _recorded(cache_dir() / x.file_name)))
    return next(known, None)


def released(name: str) -> Checkpoint:
    """The published checkpoint of this name, or the one that the backbone of this name starts from.

    Raises:
        WeightsError: there is none.
    """
    backbone = BACKBONES.get(name)
    checkpoint = CHECKPOINTS.get((backbone.checkpoint if backbone else None) or name)
    if checkpoint is None:
        raise WeightsError(f"no SAM checkpoint was released for {name!r}; choose {', '.join(CHECKPOINTS)}")
    return checkpoint


def _look_for(checkpoint: Checkpoint) -> tuple[Path | None, str]:
    """The file that MASKSAM_WEIGHTS, the cache or a package holds, None if none does, and where it was looked for."""
    file_name = checkpoint.file_name
    places = [cache_dir() / file_name, *_packaged(checkpoint)]
    if named := os.environ.get("MASKSAM_WEIGHTS"):
        path = Path(named).expanduser()
        if path.is_file():
            return path, named
        if not path.is_dir():
            raise WeightsError(f"MASKSAM_WEIGHTS={named} is neither a file nor a folder; correct it or unset it")
        places = [path / file_name, *places]
    return next((file for file in places if file.is_file()), None), " and ".join(map(str, dict.fromkeys(places)))


def _packaged(checkpoint: Checkpoint) -> list[Path]:
    """The file in the installed package that holds it, whose code stays out of it."""
    try:
        listed = files(checkpoint.package) if checkpoint.package else None
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in listed or () if file.name == checkpoint.file_name]


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> str | None:
    """The hash that ``fetch`` recorded for a file without a published one."""
    return next(iter(_record(path).read_text().split()), None) if _record(path).is_file() else None


def _wrong(origin: object, expected: str | None, received: str) -> WeightsError:
    names = {x.sha256: f" ({x.name})" for x in CHECKPOINTS.values() if x.sha256}
    wanted = f"expected {expected}{names.get(expected, '')}" if expected else "no published file is expected here"
    remedy = (
        "that is another SAM's file: give the expected one (--from, --url or MASKSAM_WEIGHTS), or correct "
        "MASKSAM_WEIGHTS_SHA256"
        if received in names
        else "fetch the file again with: masksam weights; or, for a fine-tuned checkpoint that you trust, set "
        "MASKSAM_WEIGHTS to it and MASKSAM_WEIGHTS_SHA256 to the received value"
    )
    return WeightsError(f"wrong SHA-256 for {origin}: {wanted}, received {received}{names.get(received, '')}; {remedy}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
