"""The raw dataset's own labelled test cases, predicted with all folds and scored."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from masksam_nnunet.errors import DataError, MaskSAMError
from masksam_nnunet.inference.scoring import cases_in, score_folder

from .combine import once
from .definition import Benchmark
from .nnunet import run_nnunet
from .results import row_names

TEST_COLUMNS = ("method", "case", "class", "metric", "value")


def score_test_set(
    benchmark: Benchmark, raw: Path, dataset_json: Mapping[str, Any], out: Path, tolerance_mm: float
) -> tuple[pd.DataFrame, list[str]]:
    """Predict labelled test cases with all folds by nnUNetv2_predict, ensemble pairs by nnUNetv2_ensemble, and score.

    What has been predicted from the same checkpoints and images is not predicted again. All folds are trained; ``raw``
    is the raw dataset's folder, ``out`` one for predictions and logs, and the tolerance is that of the surface Dice.

    Returns:
        A table with the columns :data:`TEST_COLUMNS`, and the commands that made the predictions; both empty without
        labelled test cases.

    Raises:
        DataError: images are missing, or a command fails.
    """
    ending = str(dataset_json["file_ending"])
    cases = cases_in(raw / "labelsTs", ending)
    if not cases:
        return pd.DataFrame(columns=list(TEST_COLUMNS)), []
    if missing := [case for case in cases if not (raw / "imagesTs" / f"{case}_0000{ending}").is_file()]:
        raise DataError(
            f"{raw / 'labelsTs'} has labels of {len(missing)} cases without an image in imagesTs "
            f"({', '.join(missing[:3])}); add the images or remove the labels"
        )
    folds, names = benchmark.folds, row_names(benchmark.methods)
    commands, tables = [], []

    def predict(name: str, command: str, arguments: Sequence[Any], sources: Sequence[Path], folder: Path) -> None:
        words = [str(argument) for argument in arguments]

        def work() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            run_nnunet(command, words, os.environ, folder.with_name(f"{folder.name}.log"))

        commands.append(shlex.join([command, *words]))
        mark = folder.with_name(f"{folder.name}.json")
        try:
            once(mark, sources, commands[-1], work)
        except (MaskSAMError, OSError) as error:
            raise DataError(
                f"the test set could not be predicted: {error}\nRun masksam report again, or move labelsTs out of "
                "the raw dataset, which then has no test set. Trained folds are kept"
            ) from error
        try:
            scores = score_folder(folder, raw / "labelsTs", dataset_json, cases, tolerance_mm, benchmark.processes)
        except MaskSAMError:
            mark.unlink()  # the next run predicts again
            raise
        tables.append(scores.assign(method=f"{name}, {len(folds)} folds"))

    for method, name in names.items():
        arguments = ["-i", raw / "imagesTs", "-o", out / method.key, "-d", raw.name, "-c", method.configuration]
        arguments += ["-p", method.plans, "-tr", method.trainer, "-f", *folds, "-device", benchmark.device]
        arguments += ["--save_probabilities"] if benchmark.ensembles else []
        sources = [benchmark.results / method.key / f"fold_{fold}" / "checkpoint_final.pth" for fold in folds]
        sources += sorted((raw / "imagesTs").iterdir())
        predict(name, "nnUNetv2_predict", arguments, sources, out / method.key)
    for a, b in combinations(names, 2) if benchmark.ensembles else ():
        folder = out / f"ensemble___{a.key}___{b.key}"
        sources = [file for method in (a, b) for file in sorted((out / method.key).glob("*.npz"))]
        arguments = ["-i", out / a.key, out / b.key, "-o", folder, "-np", benchmark.processes]
        predict(f"{names[a]} + {names[b]}", "nnUNetv2_ensemble", arguments, sources, folder)
    return pd.concat(tables, ignore_index=True)[list(TEST_COLUMNS)], commands
