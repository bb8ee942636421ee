"""The demo: a benchmark of one fold with its own data, a tiny MaskSAM and nnU-Net trained for the same minutes."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.methods import Method
from masksam_nnunet.inference.phantoms import DATASET_NAME, write_phantom_dataset
from masksam_nnunet.plans.raw_check import require_sound_dataset
from masksam_nnunet.plans.raw_data import RawDataset, place_raw_dataset, read_raw_dataset
from masksam_nnunet.plans.splits import NUM_FOLDS, group_by_patient, patient_folds
from masksam_nnunet.plans.training_inputs import DEFAULT_PLANS

from .definition import FOLDERS, Benchmark
from .folds import locked
from .nnunet import run_nnunet, termination_as_exit
from .run import run_benchmark

SETTINGS_FILE = "demo.json"
TRAINERS = ("nnUNetTrainer_budget", "MaskSAMTrainer_tiny_budget")
_FULL = "3d_fullres"


class DemoSettings(BaseModel):
    """What a demo's result depends on.

    The fields are :func:`run_demo`'s arguments; ``prepared`` says whether the data are planned and preprocessed.
    """

    model_config = ConfigDict(extra="forbid")

    data: str | None = None
    minutes: float = Field(3.0, gt=0, lt=1e6, allow_inf_nan=False)
    batch_size: int = Field(2, ge=1)
    fold: int = Field(0, ge=0, lt=NUM_FOLDS)  # nnU-Net would draw a random split for others
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    prepared: bool = False


def run_demo(
    out: Path,
    data: Path | None = None,
    minutes: float = 3.0,
    batch_size: int = 2,
    fold: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Plan, preprocess, train both methods, compare them, and print what can be done next.

    The same call continues an interrupted demo. nnU-Net's three variables must name folders in ``out`` of the same
    names; nnU-Net reads them when it is imported.

    Args:
        out: folder for nnU-Net's three folders and the report; new, empty, or of a demo with the same settings.
        data: an nnU-Net raw dataset; None for phantoms.
        minutes: training time of each method.
        batch_size: of both methods.
        fold: one of nnU-Net's five.
        seed: seeds the phantoms; nnU-Net's training is unseeded.
        console: for progress.

    Returns:
        The path of report.html; report.json lies beside it.

    Raises:
        MaskSAMError: an argument is not allowed, the dataset cannot be used, or a training fails.
    """
    console = console or Console()
    given = None if data is None else read_raw_dataset(data)  # before anything is written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = None if given is None else str(given.folder.resolve())
    values = {"data": source, "minutes": minutes, "batch_size": batch_size, "fold": fold, "seed": seed}
    try:
        settings = DemoSettings.model_validate(values | {"device": device})
    except ValidationError as error:
        wrong = (f"--{str(e['loc'][0]).replace('_', '-')} {e['input']}: {e['msg']}" for e in error.errors())
        raise UsageError("; ".join(wrong)) from error
    out = out.absolute()
    settings = _open(out, settings)
    with locked(out, "running this demo"), termination_as_exit():
        dataset = _place(given, out, settings)
        configuration = _prepare(dataset, out, settings, console)
    benchmark = Benchmark(
        dataset=dataset.name,
        configuration=configuration,
        methods=tuple(Method(trainer, DEFAULT_PLANS, configuration) for trainer in TRAINERS),
        folds=(fold,),
        minutes=minutes,
        device=device,
        ensembles=False,
        notes=_notes(settings),
        accept_unfair=True,  # on a slow machine a minute is a few iterations: the report opens with that
    )
    page = run_benchmark(benchmark, out, [device], console=console)
    console.print("A tiny unpretrained encoder, minutes of training, one small fold: no claim about converged results.")
    console.print("\nThe models can be used at once:")
    for line in (f"OUT={shlex.quote(str(out))}", *next_commands(dataset, configuration, fold, TRAINERS, device)):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    return page


def _notes(settings: DemoSettings) -> tuple[str, ...]:
    """What the report must not be taken for."""
    phantoms = "The images are phantoms: they show that everything works, not how well it works on patients."
    return (
        f"Two networks were trained from random weights for {settings.minutes:g} minutes each. The schedules of both "
        "learning rates end with that time.",
        "This is no claim about converged results: nnU-Net's usual schedule is 1000 epochs of 250 iterations. What "
        "trains faster per minute on this device leads early.",
        "It is one fold and one run of each method, on few cases: a difference of a few hundredths can be chance.",
        *([phantoms] if settings.data is None else []),
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


def _open(out: Path, settings: DemoSettings) -> DemoSettings:
    """Create the demo's folder, or continue the demo that it holds."""
    file = out / SETTINGS_FILE
    if file.is_file():
        try:
            before = DemoSettings.model_validate_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is damaged ({error}); give --out another folder") from error
        then, now = before.model_dump(exclude={"prepared"}), settings.model_dump(exclude={"prepared"})
        if differing := [f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key]]:
            raise UsageError(f"--out {out} holds another demo: {'; '.join(differing)}; give another folder")
        return before
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is no demo's folder; give a new or empty folder")
    _save(out, settings)
    return settings


def _save(out: Path, settings: DemoSettings) -> None:
    try:
        write_json(out / SETTINGS_FILE, settings.model_dump())
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}; make room or give another folder") from error


def _place(given: RawDataset | None, out: Path, settings: DemoSettings) -> RawDataset:
    raw = out / "nnUNet_raw"
    if given is not None:
        return place_raw_dataset(given, raw)
    if not settings.prepared:
        shutil.rmtree(raw / DATASET_NAME, ignore_errors=True)  # half written, if there
        write_phantom_dataset(raw, seed=settings.seed)
    return read_raw_dataset(raw / DATASET_NAME)


def _prepare(dataset: RawDataset, out: Path, settings: DemoSettings, console: Console) -> str:
    """Plan, preprocess, set batch size and folds, once; returns the configuration."""
    folder = out / "nnUNet_preprocessed" / dataset.name
    plans_file = folder / f"{DEFAULT_PLANS}.json"
    groups = group_by_patient(dataset.images)
    if not settings.prepared:
        console.print(f"Planning and preprocessing {dataset.name} (nnUNetv2_plan_and_preprocess)", highlight=False)
        require_sound_dataset(dataset.folder)
        # Right for training without worker processes, a value of 0 makes planning fail.
        environment = {key: value for key, value in os.environ.items() if key != "nnUNet_n_proc_DA"}
        workers = str(min(2, os.cpu_count() or 1))  # the demo's datasets are small
        arguments = ["-d", dataset.number, "-c", _FULL, "-npfp", workers, "-np", workers]
        arguments.append("--verify_dataset_integrity")
        run_nnunet("nnUNetv2_plan_and_preprocess", arguments, environment, out / "logs" / "plan_and_preprocess.log")
        plans = read_json(plans_file)
        configuration = _configuration(plans_file)
        if configuration != _FULL:  # nnU-Net has preprocessed nothing yet
            arguments = ["-d", dataset.number, "-c", configuration, "-np", workers]
            run_nnunet("nnUNetv2_preprocess", arguments, environment, out / "logs" / "preprocess.log")
        plans["configurations"][configuration]["batch_size"] = settings.batch_size
        write_json(plans_file, plans)
        if groups is not None:
            try:
                write_json(folder / "splits_final.json", patient_folds(groups))
            except ValueError as error:
                raise DataError(f"--data: {error}") from error
        _save(out, settings.model_copy(update={"prepared": True}))
    configuration = _configuration(plans_file)
    if groups is not None:
        console.print(f"note: the folds are drawn by patient ({len(groups)} patients)", highlight=False)
    if configuration != _FULL:
        console.print(f"note: nnU-Net planned no {_FULL} for this dataset; {configuration} is used", highlight=False)
    return configuration


def _configuration(plans_file: Path) -> str:
    return _FULL if _FULL in read_json(plans_file)["configurations"] else "2d"
