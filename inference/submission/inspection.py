"""What would be submitted of a folder of predictions, and all that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from rich.console import Console
from rich.progress import track

from masksam_nnunet.errors import SubmissionError
from masksam_nnunet.files import read_json

from .cases import expected_names, file_names, find_images, find_phases, find_predictions
from .labels import match_labels, model_labels
from .rules import ENDING, Rules, Unconfirmed, load_rules
from .volumes import prediction_defects

_LISTED = 10


@dataclass(frozen=True)
class Request:
    """What to look at; of the options, only the first two must be given.

    Attributes:
        challenge: one of ``rules.CHALLENGES``.
        predictions: folder of nnU-Net's predictions; of the decathlon also a folder of such folders, named by task.
        images: folder of the images that were predicted, by default imagesTs of ``dataset``.
        dataset: number or name of a raw dataset of nnU-Net.
        dataset_json: whose label names count, by default the one beside the predictions, else ``dataset``'s.
        rules: a file of rules of the user's own.
        task: of the decathlon, by default found by the names of the cases.
    """

    challenge: str
    predictions: Path
    images: Path | None = None
    dataset: str | None = None
    dataset_json: Path | None = None
    rules: Path | None = None
    task: str | None = None


@dataclass(frozen=True)
class Entry:
    """One file to be submitted.

    Attributes:
        name: in the archive, with its folder.
        prediction: the file that it is made from.
        image: whose grid it lies on, None if unknown.
        values: the challenge's value for each value of the prediction.
        dtype: of the voxels.
    """

    name: str
    prediction: Path
    image: Path | None
    values: Mapping[int, int]
    dtype: str


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        title: the challenge and its phase.
        entries: what is submitted if there are no defects.
        defects: why nothing can be submitted, each naming its file.
        notes: what the user should know besides.
        unconfirmed: rules that were applied without a publication of the challenge behind them.
    """

    title: str
    entries: tuple[Entry, ...]
    defects: tuple[str, ...]
    notes: tuple[str, ...]
    unconfirmed: tuple[Unconfirmed, ...]


def inspect(request: Request) -> Inspection:
    """Check a folder of predictions against the rules of a challenge; nothing is written.

    Raises:
        SubmissionError: an option is wrong, or something that all checks need is missing.
    """
    try:
        return _inspect(request)
    except OSError as error:
        raise SubmissionError(f"{error.filename or request.predictions} cannot be read: {error.strerror}") from error


def _inspect(request: Request) -> Inspection:
    rules = load_rules(request.challenge, request.rules)
    folder = Path(os.path.abspath(request.predictions))
    if not folder.is_dir():
        raise SubmissionError(f"PREDICTIONS {folder}: there is no such folder; name that which nnU-Net predicted into")
    if request.task is not None and request.task not in rules.tasks:
        names = ", ".join(rules.tasks)
        tasks = f"there are {names}" if names else f"{request.challenge} has no tasks: leave it out"
        raise SubmissionError(f"--task {request.task}: {tasks}")
    dataset = _raw_dataset(request.dataset) if request.dataset is not None else None
    parts = _parts(folder, rules, request.task)
    notes = list(rules.notes)
    defects: list[str] = []
    entries: list[Entry] = []
    several = len(parts) > 1
    for part, part_rules in parts:
        looked = _inspect_part(part, part_rules, request, dataset)
        at = f"{part.name}/" if several else ""
        entries += looked.entries
        defects += [at + defect for defect in looked.defects]
        notes += [f"{part_rules.task}: {note}" if several else note for note in looked.notes]
    if rules.tasks:
        lacking = [task for task in rules.tasks if task not in {part_rules.task for _, part_rules in parts}]
        text = f"{len(lacking)} of {len(rules.tasks)} tasks are missing: {', '.join(lacking)}"
        if lacking and rules.all_tasks:
            defects.append(text)
        elif lacking:
            notes.append(f"{text}; for an archive of several, give a folder with one of predictions for each task")
    used = {part_rules.task: rules.tasks[part_rules.task] for _, part_rules in parts if part_rules.task}
    unconfirmed = tuple(replace(rule, value=used) if rule.name == "tasks" else rule for rule in rules.unconfirmed)
    return Inspection(rules.title, tuple(entries), tuple(defects), tuple(dict.fromkeys(notes)), unconfirmed)


def _raw_dataset(dataset: str) -> Path:
    if not os.environ.get("nnUNet_raw"):
        raise SubmissionError(f"-d {dataset}: nnUNet_raw not set: raw datasets are looked for there; export it first")
    try:
        folder = Path(os.environ["nnUNet_raw"]) / str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise SubmissionError(f"-d {dataset}: {' '.join(str(error).split())}") from error
    if not folder.is_dir():
        raise SubmissionError(f"-d {dataset}: there is no {folder}; give the dataset that was predicted")
    return folder


def _parts(folder: Path, rules: Rules, task: str | None) -> list[tuple[Path, Rules]]:
    """The folders of predictions, one for each task, with their rules."""
    if not rules.tasks:
        return [(folder, rules)]
    inside = [name for name in rules.tasks if (folder / name).is_dir()]
    if task is None and inside:
        stray = [path.name for path in folder.iterdir() if path.name not in inside and not path.name.startswith(".")]
        if stray:
            raise SubmissionError(
                f"PREDICTIONS {folder} holds {', '.join(sorted(stray)[:_LISTED])} beside tasks; take that away"
            )
        return [(folder / name, rules.of_task(name)) for name in inside]
    if task is None:
        stems = [path.name.removesuffix(ENDING) for path in folder.glob(f"[!.]*{ENDING}")]
        fitting = {name: sum(rules.of_task(name).match(stem) is not None for stem in stems) for name in rules.tasks}
        task = max(fitting, key=lambda name: fitting[name])
        if not fitting[task]:
            raise SubmissionError(
                f"PREDICTIONS {folder} holds no case of a task, such as hippocampus_002{ENDING}; name the folder that "
                f"nnU-Net predicted into, or the task with --task ({', '.join(rules.tasks)})"
            )
    return [(folder, rules.of_task(task))]


def _inspect_part(folder: Path, rules: Rules, request: Request, dataset: Path | None) -> Inspection:
    """One folder of predictions; its entries, defects and notes."""
    names = _model_labels(folder, request.dataset_json, dataset)
    table = match_labels(names, rules)
    defects = list(table.defects)
    notes = list(table.notes)
    place = request.images
    if place is None and dataset is not None and (dataset / "imagesTs").is_dir():
        place = dataset / "imagesTs"
    images = find_images(place, rules) if place else {}
    if not place:
        notes.append(
            "without --images, or -d of a dataset with imagesTs, nothing is compared with the challenge's images"
            + ("" if rules.expected else ", and missing cases cannot be told")
        )
    found = find_predictions(folder, rules)
    defects += found.defects
    if found.probabilities:
        notes.append(f"{found.probabilities} files of probabilities (.npz, .pkl) are left out")
    left_out = sorted(found.cases.keys() & set(rules.left_out))
    if left_out:
        notes.append(f"left out, since the challenge does not take them: {', '.join(left_out)}")
    cases = {case: path for case, path in found.cases.items() if case not in left_out}
    wanted = {case: path for case, path in images.items() if case not in rules.left_out}
    phases = find_phases(place, dataset) if rules.needs_phase else None
    targets, unnamed = file_names(cases, rules, phases)
    defects += unnamed
    defects += _set_defects(cases, targets, wanted, rules, phases, place)
    checked, empty = _voxel_defects({c: p for c, p in cases.items() if p.name.endswith(ENDING)}, images, names)
    defects += checked
    if empty:
        notes.append(f"background only: {_listed(empty)}")
    prefix = f"{rules.folder_name}/" if rules.folder else ""
    entries = tuple(
        Entry(prefix + name, cases[case], images.get(case), table.values, rules.dtype)
        for case, name in sorted(targets.items())
    )
    return Inspection(rules.title, entries, tuple(defects), tuple(notes), rules.unconfirmed)


def _model_labels(folder: Path, given: Path | None, dataset: Path | None) -> dict[str, int]:
    places = [given] if given else [folder / "dataset.json", *([dataset / "dataset.json"] if dataset else [])]
    for path in places:
        if given is None and not path.is_file():
            continue
        try:
            return model_labels(read_json(path), str(path))
        except (OSError, ValueError) as error:
            if isinstance(error, SubmissionError):
                raise
            raise SubmissionError(f"{path} cannot be read: {error}; give the model's with --dataset-json") from error
    raise SubmissionError(
        f"there is no {places[0]}, which names the labels: they are matched by name, never by number. nnU-Net writes "
        "it beside predictions; give -d or --dataset-json"
    )


def _set_defects(
    cases: Mapping[str, Path],
    targets: Mapping[str, str],
    images: Mapping[str, Path],
    rules: Rules,
    phases: Mapping[str, str] | None,
    place: Path | None,
) -> list[str]:
    """Cases that are missing or too many, and a number of files that is not accepted."""
    defects = []
    official = expected_names(rules)
    named_images, _ = file_names(images, rules, phases)
    for case, name in targets.items():
        if official is not None and name not in official:
            defects.append(f"{cases[case].name}: {name} is none of the {len(official)} files that the challenge takes")
        elif images and case not in images:
            defects.append(f"{cases[case].name}: {place} holds no image of this case; it does not belong there")
    wanted = {name: case for case, name in named_images.items() if official is None or name in official}
    for name in sorted((official or set()) | wanted.keys()):
        if name not in targets.values():
            source = f" ({wanted[name]}{ENDING})" if name in wanted else ""
            defects.append(f"{name}: the prediction is missing{source}")
    if rules.counts is not None and len(cases) not in rules.counts:
        counts = " or ".join(map(str, rules.counts))
        defects.append(f"there are {len(cases)} predictions, the challenge takes exactly {counts}")
    if not cases:
        defects.append("there is no prediction")
    return defects


def _voxel_defects(
    cases: Mapping[str, Path], images: Mapping[str, Path], names: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """What is wrong inside the files, and the files without foreground."""
    allowed = {value: value for value in names.values()}

    def examine(item: tuple[str, Path]) -> tuple[list[str], bool]:
        case, path = item
        return prediction_defects(path, images.get(case), allowed)

    defects: list[str] = []
    empty: list[str] = []
    console = Console(stderr=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:  # unpacking releases the interpreter's lock
        results = threads.map(examine, cases.items())
        if console.is_terminal:
            results = track(results, "checking", len(cases), console=console)  # type: ignore[assignment]
        for path, (found, background) in zip(cases.values(), results, strict=True):
            defects += [f"{path.name}: {defect}" for defect in found]
            if background:
                empty.append(path.name)
    return defects, empty


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
