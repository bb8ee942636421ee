"""The demo: a benchmark of one fold with its own data, a tiny MaskSAM and nnU-Net trained for the same minutes."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from masksam_nnunet.errors import UsageError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.methods import Method
from masksam_nnunet.inference.phantoms import DATASET_NAME, write_phantom_dataset
from masksam_nnunet.plans.architecture import BASE_PLANS
from masksam_nnunet.plans.raw_check import require_sound_dataset
from masksam_nnunet.plans.raw_data import RawDataset, place_raw_dataset, read_raw_dataset
from masksam_nnunet.plans.splits import group_by_patient, patient_folds

from .definition import FOLDERS, Benchmark
from .folds import locked
from .nnunet import run_nnunet, termination_as_exit
from .run import run_benchmark

SETTINGS_FILE = "demo.json"
TRAINERS = ("nnUNetTrainer_budget", "MaskSAMTrainer_tiny_budget")
_FULL = "3d_fullres"


def run_demo(
    out: Path,
    data: Path | None = None,
    minutes: float = 3.0,
    batch_size: int = 2,
    fold: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Plan, preprocess, train both methods, compare them, and print what can be done next; the path of report.html.

    The same call continues an interrupted demo. nnU-Net's three variables must name folders in ``out`` of the same
    names; nnU-Net reads them when it is imported.

    Args:
        out: folder for nnU-Net's three folders and the report; new, empty, or of a demo with the same settings.
        data: an nnU-Net raw dataset; None for phantoms.
        minutes, batch_size: of both methods.
        fold: one of nnU-Net's five.
        seed: seeds the phantoms; nnU-Net's training is unseeded.
        console: for progress.

    Raises:
        MaskSAMError: an argument is not allowed, the dataset cannot be used, or a training fails.
    """
    console = console or Console()
    given = None if data is None else read_raw_dataset(data)  # before anything is written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = None if given is None else str(given.folder.resolve())
    settings = {"data": source, "minutes": minutes, "batch_size": batch_size, "fold": fold, "seed": seed}
    out = out.absolute()
    prepared = _open(out, settings | {"device": device})
    with locked(out, "running this demo"), termination_as_exit():
        raw = out / "nnUNet_raw"
        if given is not None:
            dataset = place_raw_dataset(given, raw)
        else:
            if not prepared:
                shutil.rmtree(raw / DATASET_NAME, ignore_errors=True)  # half written, if there
                write_phantom_dataset(raw, seed=seed)
            dataset = read_raw_dataset(raw / DATASET_NAME)
        if not prepared:
            _prepare(dataset, out, batch_size, console)
            _write(out, settings | {"device": device, "prepared": True})
    configuration = _configuration(_preprocessed(out, dataset))
    if configuration != _FULL:
        console.print(f"note: nnU-Net planned no {_FULL} for this dataset; {configuration} is used", highlight=False)
    benchmark = Benchmark(
        dataset=dataset.name,
        configuration=configuration,
        methods=tuple(Method(trainer, BASE_PLANS, configuration) for trainer in TRAINERS),
        folds=(fold,),
        minutes=minutes,
        device=device,
        ensembles=False,
        notes=_notes(minutes, phantoms=data is None),
        accept_unfair=True,  # on a slow machine a minute is a few iterations: the report opens with that
    )
    page = run_benchmark(benchmark, out, [device], console=console)
    console.print("A tiny unpretrained encoder, minutes of training, one small fold: no claim about converged results.")
    console.print("\nThe models can be used at once:")
    for line in (f"OUT={shlex.quote(str(out))}", *next_commands(dataset, configuration, fold, TRAINERS, device)):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    return page


def _notes(minutes: float, phantoms: bool) -> tuple[str, ...]:
    """What the report must not be taken for."""
    made_up = "The images are phantoms: they show that everything works, not how well it works on patients."
    return (
        f"Two networks were trained from random weights for {minutes:g} minutes each. The schedules of both "
        "learning rates end with that time.",
        "This is no claim about converged results: nnU-Net's usual schedule is 1000 epochs of 250 iterations. What "
        "trains faster per minute on this device leads early.",
        "It is one fold and one run of each method, on few cases: a difference of a few hundredths can be chance.",
        *([made_up] if phantoms else []),
    )


def next_commands(
    dataset: RawDataset, configuration: str, fold: int, trainers: Sequence[str], device: str
) -> list[str]:
    """Shell lines, with ``$OUT`` for the demo's folder, that predict with each model and ensemble them."""
    images = f'"$OUT/nnUNet_raw/{dataset.name}/{dataset.test_images.name}"'
    options = f"-d {dataset.number} -c {configuration} -f {fold} -device {device} --save_probabilities"
    outputs = {trainer: f'"$OUT/predictions/{trainer}"' for trainer in trainers}
    return [
        *(f'export {name}="$OUT/{name}"' for name in FOLDERS),
        'eval "$(masksam env)"',
        *(f"nnUNetv2_predict -i {images} -o {folder} -tr {name} {options}" for name, folder in outputs.items()),
        f'nnUNetv2_ensemble -i {" ".join(outputs.values())} -o "$OUT/predictions/ensemble" -np 2',
    ]


def _open(out: Path, settings: Mapping[str, Any]) -> bool:
    """Create the demo's folder, or continue the demo that it holds; whether its data are preprocessed."""
    file = out / SETTINGS_FILE
    if file.is_file():
        try:
            before = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file} is damaged ({error}); give --out another folder") from error
        if differing := [f"{key} was {before.get(key)}, is {v}" for key, v in settings.items() if before.get(key) != v]:
            raise UsageError(f"--out {out} holds another demo: {'; '.join(differing)}; give another folder")
        return bool(before.get("prepared"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is no demo's folder; give a new or empty folder")
    _write(out, settings)
    return False


def _write(out: Path, settings: Mapping[str, Any]) -> None:
    try:
        write_json(out / SETTINGS_FILE, settings)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out} cannot be written: {error}; make room or give another folder") from error


def _prepare(dataset: RawDataset, out: Path, batch_size: int, console: Console) -> None:
    """Plan, preprocess, set batch size and folds."""
    console.print(f"Planning and preprocessing {dataset.name} (nnUNetv2_plan_and_preprocess)", highlight=False)
    require_sound_dataset(dataset.folder)
    # Right for training without worker processes, a value of 0 makes planning fail.
    environment = {key: value for key, value in os.environ.items() if key != "nnUNet_n_proc_DA"}
    workers = str(min(2, os.cpu_count() or 1))  # the demo's datasets are small
    arguments = ["-d", dataset.number, "-c", _FULL, "-npfp", workers, "-np", workers, "--verify_dataset_integrity"]
    run_nnunet("nnUNetv2_plan_and_preprocess", arguments, environment, out / "logs" / "plan_and_preprocess.log")
    folder = _preprocessed(out, dataset)
    configuration = _configuration(folder)
    if configuration != _FULL:  # nnU-Net has preprocessed nothing yet
        arguments = ["-d", dataset.number, "-c", configuration, "-np", workers]
        run_nnunet("nnUNetv2_preprocess", arguments, environment, out / "logs" / "preprocess.log")
    plans = read_json(folder / f"{BASE_PLANS}.json")
    plans["configurations"][configuration]["batch_size"] = batch_size
    write_json(folder / f"{BASE_PLANS}.json", plans)
    groups = group_by_patient(dataset.images)
    if groups is not None:
        write_json(folder / "splits_final.json", patient_folds(groups))
        console.print(f"note: the folds are drawn by patient ({len(groups)} patients)", highlight=False)


def _preprocessed(out: Path, dataset: RawDataset) -> Path:
    return out / "nnUNet_preprocessed" / dataset.name


def _configuration(preprocessed: Path) -> str:
    return _FULL if _FULL in read_json(preprocessed / f"{BASE_PLANS}.json")["configurations"] else "2d"
