"""``masksam doctor``: look at all that a training needs, one by one. Heavy imports inside."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from packaging.requirements import Requirement

from masksam_nnunet.environment import EXT_TRAINER, RANDOM_INIT, cpu_name, switched_on, untested_nnunet
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.sam_files import CHECKPOINTS

from .common import DEFAULT_TRAINER

if TYPE_CHECKING:
    import torch

PACKAGE = "masksam-nnunet"
FOLDERS = {"nnUNet_raw": False, "nnUNet_preprocessed": True, "nnUNet_results": True}
"""nnU-Net's variables, and whether a training writes there."""
LITTLE_ROOM, LITTLE_SHARED = 10 * 2**30, 2**30
BATCH = 2 * 10 * 256 * 224 * 6
"""Bytes: two patches of nnU-Net's plan for ACDC, with labels."""
PATCH, SECONDS = (4, 64, 64), 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    value: str
    trouble: str = ""
    """What is wrong with it and what to do; "" if nothing."""
    fatal: bool = True
    """Whether a training would fail, where there is trouble."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(doctor)


def doctor(
    device: Annotated[
        str | None, typer.Option("-device", "--device", help="cpu or cuda.", show_default="cuda, else cpu")
    ] = None,
) -> None:
    """Look at what a training needs, and train for five seconds. Exit code 1 if a training would fail."""
    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"-device {device}: give cpu or cuda")
    from masksam_nnunet.gpu import automatic_device

    fatal = 0
    for finding in findings(device):
        typer.echo(f"{finding.what:<26}{finding.value}")
        if finding.trouble:
            fatal += finding.fatal
            typer.secho(f"  {'PROBLEM' if finding.fatal else 'note'}: {finding.trouble}", fg=typer.colors.RED)
    if fatal:
        typer.echo(f"\nA training would fail: {fatal} problem{'s' * (fatal > 1)}.")
        raise typer.Exit(1)
    # Without the option, masksam train takes a GPU.
    option = " with -device cpu" if device is None and automatic_device() == "cpu" else ""
    typer.echo(f"\nA training can start{option}.")


def findings(device: str | None) -> Iterator[Finding]:
    """All that is looked at; ``device`` as the option."""
    yield from _told("versions", _versions)
    yield from _told("GPU", lambda: _gpus(device))
    yield from _told("nnU-Net's folders", _folders)
    yield from _told(EXT_TRAINER, _trainers)
    yield from _told("SAM's weights", _weights)
    yield from _told("/dev/shm", _shared_memory)
    yield from _told("five seconds of training", lambda: _step(device))


def _told(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What ``look`` finds; if it fails, that is what is found."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(what, "failed", f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    yield Finding("system", f"{platform.platform()}, {cpu_name()}")
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
    yield Finding(PACKAGE, version(PACKAGE))
    needed = {one.name: one.specifier for one in map(Requirement, requires(PACKAGE) or ()) if one.marker is None}
    for name in ("nnunetv2", "segment-anything", "torch", "torchvision", "timm", "numpy"):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        wrong = found == "missing" or not needed[name].contains(found, prereleases=True)
        trouble = f"{name}{needed[name]} is needed: pip install '{name}{needed[name]}'" if wrong else ""
        if name == "nnunetv2" and not wrong:
            trouble = untested_nnunet(found)
        yield Finding(name, found, trouble, fatal=wrong)


def _gpus(device: str | None) -> Iterator[Finding]:
    import torch

    from masksam_nnunet.gpu import driver_version, gpu_trouble
    from masksam_nnunet.modeling.compute import autocast_dtype

    trouble, there = gpu_trouble() or "", torch.cuda.is_available()
    if device == "cuda" and not there and not trouble:
        trouble = "PyTorch sees no GPU here: use a machine with one, or -device cpu"
    built = f"PyTorch's CUDA {torch.version.cuda}, NVIDIA's driver {driver_version() or 'missing'}"
    yield Finding("GPUs", f"{torch.cuda.device_count()}; {built}", trouble, fatal=device != "cpu")
    for index in range(torch.cuda.device_count() if there else 0):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        value = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {_gib(free)} of {_gib(total)} free"
        yield Finding(f"GPU {index}", value, "other programs use it" if free < total / 2 else "", fatal=False)
    where = torch.device("cuda" if there and not trouble and device != "cpu" else "cpu")
    dtype = autocast_dtype(where)
    yield Finding("trains on", f"{where.type}, {str(dtype).removeprefix('torch.')}")
    if where.type == "cuda":
        cudnn = torch.backends.cudnn.version() or 0
        package = f"nvidia-cudnn-cu{(torch.version.cuda or '12').split('.')[0]}"
        slow = f"it leaves 3D convolutions in bfloat16 to slow kernels: pip install -U '{package}>=9.15'"
        yield Finding("cuDNN", str(cudnn), slow if cudnn in _WITHOUT_CONV3D else "", fatal=False)
        kernels = (f"{name}: {_kernel(tokens, size, where, dtype)}" for name, tokens, size in _ATTENTION)
        yield Finding("attention", "; ".join(kernels))


_WITHOUT_CONV3D = range(90800, 91500)
"""Versions of cuDNN that PyTorch does not use for 3D convolutions in 16 bits (PyTorch's issue 166122)."""
_ATTENTION = (("ViT-B, 64x64 tokens", 64 * 64, 64 + 64 + 64), ("ViT-B, 14x14 windows", 14 * 14, 64 + 14 + 14 + 4))
"""Tokens and length of the vectors, in which positions are."""


def _kernel(tokens: int, size: int, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that PyTorch takes for attention."""
    import torch
    from torch.nn.attention import SDPBackend

    x = torch.zeros(1, 1, tokens, size, device=device, dtype=dtype, requires_grad=True)
    name: str = SDPBackend(torch._fused_sdp_choice(x, x, x)).name
    return name.lower().replace("_", " ")


def _folders() -> Iterator[Finding]:
    for name, written in FOLDERS.items():
        given = os.environ.get(name)
        if not given:
            yield Finding(name, "not set", f"export {name}=FOLDER (nnU-Net's documentation)", fatal=written)
        elif not Path(given).is_dir():
            yield Finding(name, given, f"there is no such folder: make it, or correct {name}", fatal=written)
        else:
            free, trouble = shutil.disk_usage(given).free, ""
            if written and not os.access(given, os.W_OK):
                trouble = f"it cannot be written: change its permissions, or {name}"
            few = "a dataset and its trained folds can take more" if free < LITTLE_ROOM else ""
            yield Finding(name, f"{given}, {_gib(free)} free", trouble or few, fatal=bool(trouble))


def _trainers() -> Iterator[Finding]:
    found = None
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        with contextlib.suppress(RuntimeError):  # nnU-Net's for a name that it does not find
            found = recursive_find_trainer_class_by_name(DEFAULT_TRAINER)
    missing = f'nnUNetv2_train does not find {DEFAULT_TRAINER}: eval "$(masksam env)"; masksam train needs no such line'
    yield Finding(EXT_TRAINER, os.environ.get(EXT_TRAINER) or "not set", "" if found else missing, fatal=False)


def _weights() -> Iterator[Finding]:
    from masksam_nnunet.sam_weights import find, located

    here = [name for name, checkpoint in CHECKPOINTS.items() if located(checkpoint)]
    if switched_on(RANDOM_INIT):
        here = [f"not used: {RANDOM_INIT} is set"]
    elif not here:
        here = [str(find("vit_b"))]
    yield Finding("SAM's weights", ", ".join(here))


def _shared_memory() -> Iterator[Finding]:
    from masksam_nnunet.trainers.loading import SHARED_MEMORY, require_shared_memory

    if SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(SHARED_MEMORY).total
        few = "nnU-Net's workers pass batches through it: start the container with --shm-size=8g"
        trouble, fatal = few if room < LITTLE_SHARED else "", False
        try:
            require_shared_memory(BATCH, pinned=True)
        except TrainingError as error:
            trouble, fatal = f"with batches as of nnU-Net's plan for ACDC: {error}", True
        yield Finding("/dev/shm", _gib(room), trouble, fatal)


def _step(device: str | None) -> Iterator[Finding]:
    """A training of LiteMedSAM with random weights on noise."""
    import torch

    from masksam_nnunet.cost import dice_and_cross_entropy
    from masksam_nnunet.gpu import automatic_device
    from masksam_nnunet.losses.criterion import MaskSAMCriterion
    from masksam_nnunet.modeling import MaskSAM
    from masksam_nnunet.modeling.compute import autocast, keep_freed_memory
    from masksam_nnunet.plans.architecture import config_for

    where = torch.device("cpu" if device == "cpu" else automatic_device())
    if where.type == "cpu":
        keep_freed_memory()
    config = config_for("lite_medsam", PATCH, regions=False)
    network = MaskSAM(config, 1, 4).to(where).train()
    judge = MaskSAMCriterion(config, 4, semantic_loss=dice_and_cross_entropy)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randn(2, 1, *PATCH, device=where)
    truth = (x > 1).short() + (x > 2).short()
    steps, began = -1, 0.0  # the first is a warm-up
    while steps < 1 or time.perf_counter() - began < SECONDS:
        optimizer.zero_grad(set_to_none=True)
        with autocast(where):
            output = network(x)
        loss, _ = judge(output, truth)
        loss.backward()
        optimizer.step()
        finite = bool(loss.isfinite())  # waits for a GPU
        steps += 1
        began = began or time.perf_counter()
    took = (time.perf_counter() - began) / steps
    value = f"LiteMedSAM, two patches of {'x'.join(map(str, PATCH))}: {took:.3g} s for a step"
    trouble = "" if finite else "the loss is not finite: report it, with all of this"
    yield Finding("five seconds of training", value, trouble)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
