"""SAM's released checkpoints: find, fetch, verify, and load them into a network's SAM parts.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .download import cache_dir, fetch_verified
from .errors import FetchError, WeightsError
from .sam_state import Interpolated, LoadReport, identify_backbone, read_checkpoint, remap_sam_state_dict

__all__ = [
    "SAM_RELEASES",
    "Interpolated",
    "LoadReport",
    "SamRelease",
    "WeightsError",
    "cache_dir",
    "fetch",
    "find",
    "find_exact",
    "identify_backbone",
    "load_sam",
    "read_checkpoint",
    "remap_sam_state_dict",
    "verify",
]


@dataclass(frozen=True)
class SamRelease:
    """One checkpoint that Meta published, under Apache-2.0."""

    file_name: str
    url: str
    sha256: str


def _meta(file_name: str, sha256: str) -> SamRelease:
    return SamRelease(file_name, f"https://dl.fbaipublicfiles.com/segment_anything/{file_name}", sha256)


SAM_RELEASES: dict[str, SamRelease] = {
    "vit_b": _meta("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": _meta("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": _meta("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}


def find(backbone: str) -> Path:
    """The checkpoint for ``backbone`` on this machine: the one that MASKSAM_WEIGHTS names, else the cached one.

    It is not opened: ``load_sam`` verifies it.

    Raises:
        WeightsError: there is none, or the variable names nothing.
    """
    path, looked_at = _look_for(backbone)
    if path is not None:
        return path
    raise WeightsError(
        f"no SAM checkpoint for {backbone}: looked for {looked_at}; fetch it with: masksam weights "
        f"{backbone}; or set MASKSAM_WEIGHTS to a file that you have; or, to train without SAM's weights, "
        "set MASKSAM_RANDOM_INIT=1"
    )


def find_exact(backbone: str, sha256: str) -> Path:
    """The checkpoint for ``backbone`` that a lean checkpoint was trained with, known by its hash in hex.

    The places are those of ``find``; MASKSAM_WEIGHTS_SHA256 has no say.

    Raises:
        WeightsError: there is none, or it is another file.
    """
    path, looked_at = _look_for(backbone)
    received = "" if path is None else _sha256(path)
    if path is not None and received == sha256:
        return path
    seen = f"looked for {looked_at}" if path is None else f"found {path} with {received}{_known(received)}"
    fetched = f"fetch it with: masksam weights {backbone}; or " if _release(backbone).sha256 == sha256 else ""
    if fetched and os.environ.get("MASKSAM_WEIGHTS"):
        fetched = f"unset MASKSAM_WEIGHTS and {fetched}"
    raise WeightsError(
        f"this is a lean checkpoint: it needs the SAM {backbone} file with SHA-256 {sha256}{_known(sha256)}, but "
        f"{seen}; {fetched}set MASKSAM_WEIGHTS to that file; or ask for a model made with masksam export, which needs "
        "no SAM file"
    )


def verify(path: Path, backbone: str) -> str:
    """The SHA-256 of ``path`` in hex, once it is known to be the expected one.

    Expected is the release's hash, or what MASKSAM_WEIGHTS_SHA256 says (``skip`` expects nothing).

    Raises:
        WeightsError: another hash, or the file cannot be read.
    """
    release = _release(backbone)
    named = os.environ.get("MASKSAM_WEIGHTS_SHA256", "").strip().lower()
    if named and named != "skip" and not re.fullmatch("[0-9a-f]{64}", named):
        raise WeightsError(f"MASKSAM_WEIGHTS_SHA256={named} is neither 64 hexadecimal digits nor 'skip'")
    received = _sha256(path)
    if named != "skip":
        _compare(str(path), received, release, override=named or None)
    return received


def fetch(
    backbone: str,
    *,
    url: str | None = None,
    source: Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Bring the released checkpoint of ``backbone`` into the cache, unless it is there and sound.

    The cached file appears only once it is complete and verified against the release. A download that broke off is
    resumed from ``<file>.part``. Concurrent calls wait for one another.

    Args:
        backbone: a key of ``SAM_RELEASES``.
        url: another address than $MASKSAM_WEIGHTS_URL or Meta's; ending in "/", the folder that holds the file.
        source, force, progress: as in ``fetch_verified``.

    Returns:
        The cached file.

    Raises:
        WeightsError: unknown backbone, no connection, wrong hash, or the cache cannot be written.
    """
    release = _release(backbone)
    if source is not None and not (source.is_file() and os.access(source, os.R_OK)):
        raise WeightsError(f"cannot read {source}: --from takes a checkpoint file")
    address = url or os.environ.get("MASKSAM_WEIGHTS_URL") or release.url

    def check(path: Path, origin: str) -> None:
        _compare(origin, _sha256(path), release)

    try:
        return fetch_verified(release.file_name, address, check, source=source, force=force, progress=progress)
    except WeightsError:
        raise
    except FetchError as error:
        raise WeightsError(str(error)) from error


def load_sam(parts: Mapping[str, nn.Module], backbone: str, path: Path, new: Sequence[str] = ()) -> LoadReport:
    """Verify ``path``, read it, fit it and copy it into ``parts``: all of it, or nothing at all.

    Args:
        parts: "image_encoder", "prompt_encoder" and "mask_decoder", each a module whose keys are SAM's own.
        backbone: a key of ``SAM_RELEASES``.
        path: the checkpoint.
        new: names of parameters that do not come from SAM, for the report. Those that stand inside a part
            ("mask_decoder.adapter.weight") are left as they are.

    Raises:
        WeightsError: the file is missing, damaged, untrusted or does not fit.
    """
    sha256 = verify(path, backbone)
    targets = {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}
    for name in new:
        targets.pop(name, None)
    unallocated = [key for key, value in targets.items() if value.is_meta]
    if unallocated:
        raise ValueError(f"parts on the meta device cannot be loaded, allocate them first: {unallocated[0]}")
    state, report = remap_sam_state_dict(read_checkpoint(path), {key: value.shape for key, value in targets.items()})
    with torch.no_grad():
        for key, value in state.items():
            targets[key].copy_(value)
    return replace(report, new=tuple(new), file=str(path), sha256=sha256)


def _look_for(backbone: str) -> tuple[Path | None, str]:
    """The file that MASKSAM_WEIGHTS or the cache holds, None if neither does, and where it was looked for."""
    release = _release(backbone)
    looked_at: list[str] = []
    if named := os.environ.get("MASKSAM_WEIGHTS"):
        path = Path(named).expanduser()
        if path.is_file():
            return path, named
        if not path.is_dir():
            raise WeightsError(f"MASKSAM_WEIGHTS={named} is neither a file nor a folder; correct it or unset it")
        looked_at.append(str(path / release.file_name))
    looked_at.append(str(cache_dir() / release.file_name))
    found = next((Path(file) for file in looked_at if Path(file).is_file()), None)
    return found, " and ".join(looked_at)


def _release(backbone: str) -> SamRelease:
    if backbone not in SAM_RELEASES:
        raise WeightsError(f"no SAM checkpoint was released for {backbone!r}; there are {', '.join(SAM_RELEASES)}")
    return SAM_RELEASES[backbone]


def _compare(origin: str, received: str, release: SamRelease, override: str | None = None) -> None:
    """Raise unless ``received`` is the release's hash or, where given, the one in ``override``."""
    expected = override or release.sha256
    if received == expected:
        return
    by = "MASKSAM_WEIGHTS_SHA256" if override else f"the released {release.file_name}"
    raise WeightsError(
        f"wrong SHA-256 for {origin}: expected {expected} ({by}), received {received}{_known(received)}"
        "; fetch the file again with: masksam weights; or, for a fine-tuned checkpoint in SAM's format that you "
        "trust, point MASKSAM_WEIGHTS at it and set MASKSAM_WEIGHTS_SHA256 to the received value"
    )


def _known(sha256: str) -> str:
    """Words for the hash of a release."""
    name = next((name for name, release in SAM_RELEASES.items() if release.sha256 == sha256), None)
    return f", which is SAM's {name}" if name else ""


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
