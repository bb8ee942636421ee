"""The demo: a tiny MaskSAM and nnU-Net trained for the same minutes, scored on the same fold, shown on one page."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from masksam_nnunet.errors import DemoError
from masksam_nnunet.plans.raw_data import RawDataset, read_raw_dataset
from masksam_nnunet.plans.splits import NUM_FOLDS

from .commands import nnunet_environment
from .demo_end import print_end
from .demo_folder import PHANTOMS, DemoFolder, DemoSettings
from .demo_progress import DemoProgress
from .demo_report import write_report
from .demo_steps import METHODS, DemoSteps

__all__ = ["DemoError", "run_demo"]


def run_demo(out: Path, data: Path | None, minutes: float, batch_size: int, fold: int, seed: int) -> Path:
    """Plan, preprocess, train both methods, score them and write the report, with nnU-Net's own commands.

    A run that was broken off is taken up by calling again with the same arguments: what it finished is used.

    Args:
        out: folder for the nnU-Net folders, logs and report; new, empty, or of a demo of the same settings.
        data: an nnU-Net raw dataset, or None for phantoms.
        minutes: training time of each method.
        batch_size: of both methods.
        fold: one of nnU-Net's five.
        seed: of the phantoms; nnU-Net's training has no seed.

    Returns:
        The path of report.html; report.json lies beside it.

    Raises:
        DemoError: for arguments that cannot be, a dataset that nnU-Net cannot use, or a command that fails.
    """
    given = None if data is None else read_raw_dataset(data)  # before anything is written
    settings = _settings(given, minutes, batch_size, fold, seed)
    folder = DemoFolder.open(out, settings)
    steps = {"data": 3.0, "preprocess": 45.0} | {m.trainer: 60 * minutes + 30 for m in METHODS} | {"report": 25.0}
    console = Console()
    with DemoProgress(console, steps) as progress, _disk_in_words(folder.root):
        run = DemoSteps(folder, progress, nnunet_environment(folder.raw, folder.preprocessed, folder.results))
        dataset = run.place_data(given)
        configuration = run.preprocess(dataset)
        for method in METHODS:
            run.train(dataset, configuration, method)
        with progress.step("report", "Scoring, drawing, writing the report"):
            report = run.report(dataset, configuration)
            page = write_report(folder.root, report)
    print_end(console, page, report)
    return page


@contextlib.contextmanager
def _disk_in_words(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DemoError(
            f"--out {out} cannot be written: {error}; make room or make it writable, then give the same command again"
        ) from error


def _settings(given: RawDataset | None, minutes: float, batch_size: int, fold: int, seed: int) -> DemoSettings:
    if not (math.isfinite(minutes) and minutes > 0):
        raise DemoError(f"--minutes must be a positive number, not {minutes}")
    if batch_size < 1:
        raise DemoError(f"--batch-size must be at least 1, not {batch_size}")
    if not 0 <= fold < NUM_FOLDS:  # nnU-Net would silently draw a random split
        raise DemoError(f"--fold must be from 0 to {NUM_FOLDS - 1}, not {fold}: nnU-Net makes {NUM_FOLDS} folds")
    if seed < 0:
        raise DemoError(f"--seed must not be negative, but is {seed}")
    data = PHANTOMS if given is None else str(given.folder.resolve())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DemoSettings(data, float(minutes), batch_size, fold, seed, device)
