"""Every score of every case in one table, and what is cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import write_text_atomically

from .results import Metric, Row

METRICS: tuple[Metric, ...] = ("dice", "hd95_mm", "surface_dice", "volume_error_ml")
COLUMNS = ("row", "kind", "fold", "case", "class", *METRICS[:3], "truth_ml", "predicted_ml", METRICS[3])


def case_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Scores in long form, one line per row, case and class, in this order; NaN where undefined.

    Columns: ``row, kind, fold, case, class, dice, hd95_mm, surface_dice, truth_ml, predicted_ml, volume_error_ml``, the
    last with its sign.

    Raises:
        BenchmarkError: a scored case belongs to no fold.
    """
    lines = []
    for row in rows:
        for case in row.scores.cases:
            if case.case not in row.fold_of:
                raise BenchmarkError(
                    f"{row.name!r} has scores of case {case.case!r}, which no fold of splits_final.json validates; "
                    f"remove it from {row.predictions}, or restore the splits that the folds were trained with"
                )
            for name, score in case.classes.items():
                lines.append(
                    {
                        "row": row.name,
                        "kind": row.kind,
                        "fold": row.fold_of[case.case],
                        "case": case.case,
                        "class": name,
                        "dice": score.dice,
                        "hd95_mm": score.hd95_mm,
                        "surface_dice": score.surface_dice,
                        "truth_ml": score.truth_ml,
                        "predicted_ml": score.predicted_ml,
                        "volume_error_ml": score.volume_error_ml,
                    }
                )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def wide(frame: pd.DataFrame, metric: Metric, class_name: str) -> pd.DataFrame:
    """One metric as a matrix: cases, sorted, by rows, in the order of ``frame``.

    Volume errors are absolute here: too much in one case must not make up for too little in another.

    Args:
        frame: of :func:`case_table`.
        metric: its column.
        class_name: its column "class".
    """
    values = frame[metric].abs() if metric == "volume_error_ml" else frame[metric]
    chosen = frame[["row", "case", "class"]].assign(value=values)
    chosen = chosen[chosen["class"] == class_name]
    matrix = chosen.pivot(index="case", columns="row", values="value").sort_index()
    return matrix.reindex(columns=list(dict.fromkeys(frame["row"])))


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table without its index, whole or not at all; undefined values are empty."""
    write_text_atomically(path, frame.to_csv(index=False, lineterminator="\n"))
