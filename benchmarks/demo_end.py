"""What the demo says at its end: the table, and the commands that use what it trained."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from masksam_nnunet.plans.raw_data import RawDataset

from .demo_report import Report, overall_rows


def next_commands(
    dataset: RawDataset, configuration: str, fold: int, trainers: Sequence[str], device: str
) -> list[str]:
    """Shell lines, with ``$OUT`` for the demo's folder, that predict with each model and ensemble them."""
    images = f'"$OUT/nnUNet_raw/{dataset.name}/{dataset.test_images.name}"'
    lines = [f'export {name}="$OUT/{name}"' for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    lines.append('eval "$(masksam env)"')
    for trainer in trainers:
        lines.append(
            f'nnUNetv2_predict -i {images} -o "$OUT/predictions/{trainer}" -d {dataset.number} '
            f"-c {configuration} -f {fold} -tr {trainer} -device {device} --save_probabilities"
        )
    members = " ".join(f'"$OUT/predictions/{trainer}"' for trainer in trainers)
    lines.append(f'nnUNetv2_ensemble -i {members} -o "$OUT/predictions/ensemble" -np 2')
    return lines


def print_end(console: Console, page: Path, report: Report) -> None:
    """Print the overall table, where the report is, and the next commands."""
    table = Table(title=f"{report.dataset}, fold {report.fold}, {len(report.cases)} validation cases")
    table.add_column("")
    for method in report.methods:
        table.add_column(method.name, justify="right")
    for title, cells in overall_rows(report.methods):
        table.add_row(escape(title), *(f"[bold]{cell.text}[/]" if cell.best else cell.text for cell in cells))
    console.print(table)
    console.print("A tiny unpretrained encoder, minutes of training, one small fold: no claim about converged results.")
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    console.print("\nThe models can be used at once:")
    for line in (f"OUT={shlex.quote(str(page.parent))}", *report.commands):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
