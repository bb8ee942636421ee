"""The raw dataset's own test cases, where it has labels for them: predicted by all folds together, and ensembled."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import BenchmarkError, MaskSAMError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.label_maps import LabelMapError
from masksam_nnunet.inference.scoring import Scores, cases_in, score_folder

from .names import joint_name, row_names
from .nnunet import run_nnunet
from .results import Method, TestSetScore


def labelled_test_cases(raw: Path, dataset_json: Mapping[str, Any]) -> list[str]:
    """Names of the cases in labelsTs, sorted; none where there is no such folder."""
    return cases_in(raw / "labelsTs", str(dataset_json["file_ending"]))


def score_test_set(
    methods: Sequence[Method],
    raw: Path,
    dataset_json: Mapping[str, Any],
    folds: Sequence[int],
    ensembles: bool,
    device: str,
    out: Path,
    processes: int,
    tolerance_mm: float,
) -> tuple[list[TestSetScore], list[str]]:
    """Predict by nnUNetv2_predict with all folds, ensemble pairs by nnUNetv2_ensemble, score; what is done is kept.

    Args:
        methods: trained in ``folds``.
        raw: the raw dataset's folder.
        dataset_json: its description.
        folds: whose predictions are averaged.
        ensembles: whether to ensemble pairs of methods.
        device: as nnU-Net's option takes it.
        out: folder for predictions and logs.
        processes: workers for scoring.
        tolerance_mm: of the surface Dice, the cross-validation's.

    Returns:
        The scores, and the commands that were needed. Both empty without labelled test cases.

    Raises:
        BenchmarkError: images lack, or a command fails.
    """
    cases = labelled_test_cases(raw, dataset_json)
    if not cases:
        return [], []
    _check_images(raw, cases, dataset_json["file_ending"])
    names = row_names(methods)
    commands: list[str] = []
    found: list[tuple[str, tuple[Method, ...], Path]] = []
    for method in methods:
        folder = out / method.key
        arguments = ["-i", raw / "imagesTs", "-o", folder, "-d", raw.name, "-c", method.configuration]
        arguments += ["-p", method.plans, "-tr", method.trainer, "-f", *folds, "-device", device]
        arguments += ["--save_probabilities"] if ensembles else []
        model = Path(os.environ["nnUNet_results"]) / raw.name / method.key
        checkpoints = [model / f"fold_{fold}" / "checkpoint_final.pth" for fold in folds]
        sources = [*checkpoints, *sorted(file for file in (raw / "imagesTs").iterdir() if file.is_file())]
        commands.append(_run("nnUNetv2_predict", [str(a) for a in arguments], sources, folder))
        found.append((f"{names[method]}, {len(folds)} folds", (method,), folder))
    for a, b in combinations(methods, 2) if ensembles else ():
        folder = out / f"ensemble___{a.key}___{b.key}"
        sources = [file for m in (a, b) for file in sorted((out / m.key).glob("*.npz"))]
        arguments = ["-i", out / a.key, out / b.key, "-o", folder, "-np", processes]
        commands.append(_run("nnUNetv2_ensemble", [str(x) for x in arguments], sources, folder))
        found.append((f"{joint_name([names[a], names[b]])}, {len(folds)} folds", (a, b), folder))
    scored: list[TestSetScore] = []
    for name, members, folder in found:
        scores = _score(folder, raw / "labelsTs", dataset_json, cases, tolerance_mm, processes)
        scored.append(TestSetScore(name, members, scores, folder))
    return scored, commands


def _check_images(raw: Path, cases: Sequence[str], ending: str) -> None:
    missing = [case for case in cases if not (raw / "imagesTs" / f"{case}_0000{ending}").is_file()]
    if missing:
        raise BenchmarkError(
            f"{raw / 'labelsTs'} has labels of {len(missing)} cases without an image in imagesTs "
            f"({', '.join(missing[:3])}): add the images or remove the labels"
        )


def _run(command: str, arguments: list[str], sources: Sequence[Path], folder: Path) -> str:
    """Run it, into an empty folder, unless it has been run on the same sources; the command line.

    Raises:
        BenchmarkError: it fails, or the disk is full.
    """
    line = shlex.join([command, *arguments])
    status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    stamp = hashlib.sha256(repr((line, status)).encode()).hexdigest()
    mark = folder.with_name(f"{folder.name}.json")
    if _remembered(mark) != {"stamp": stamp}:
        try:
            mark.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            run_nnunet(command, arguments, os.environ, folder.with_name(f"{folder.name}.log"))
            write_json(mark, {"stamp": stamp})
        except (MaskSAMError, OSError) as error:
            raise BenchmarkError(
                f"the test set could not be predicted: {error}\nMend that, run masksam report again, or move labelsTs "
                "out of the raw dataset, which then has no test set. Trained folds are kept."
            ) from error
    return line


def _remembered(mark: Path) -> object:
    """What a mark holds; None, so that it is done again, where that cannot be told."""
    try:
        return read_json(mark)
    except (OSError, ValueError):
        return None


def _score(
    folder: Path, truths: Path, dataset_json: Mapping[str, Any], cases: Sequence[str], tolerance_mm: float, workers: int
) -> Scores:
    try:
        return score_folder(folder, truths, dataset_json, cases, tolerance_mm, processes=workers)
    except LabelMapError as error:
        raise BenchmarkError(f"the test set cannot be scored, {folder}: {error}") from error
