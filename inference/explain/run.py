"""``masksam explain``, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from masksam_nnunet.errors import ExplainError
from masksam_nnunet.files import write_json

from ..label_maps import Classes, class_mask
from ..models import previous_stage
from ..report.figures import CLASS_COLOURS, colour_of, style_of
from ..report.html import Picture
from ..versions import versions
from .case import CaseFiles, find_case, fold_of
from .facts import LEAST_SHARE, SliceFacts, slice_facts
from .figures import SliceImages, draw_overview, draw_queries, queries_view
from .folder import RECORD, fresh_folder
from .model import Explained, find_model, load_predictor
from .overlays import write_colour_table, write_label_table, write_volume
from .page import Explanation, Overlay, SlicePage, render, to_json
from .slices import check_slices, choose_slices, read_slices
from .uncertainty import Measured, measure
from .volume import Volume, read_case
from .windows import Queries, run_windows

PAGE = "explain.html"


@dataclass(frozen=True)
class Request:
    """What to explain, as the command's options say.

    Attributes:
        dataset: number or name.
        configuration: nnU-Net's.
        trainer: the trainer's class.
        plans: name of the plans.
        folds: numbers, or "all"; the queries shown are the first one's.
        checkpoint: file name.
        case: its name.
        images: files, for what is no case of the dataset.
        label: the label map to show.
        previous: for a cascade, the folder with the predictions of the stage before.
        slices: words: numbers, or auto.
        out: the output folder; ``explain_CASE`` if not given.
        device: torch's name of it; CUDA where there is one if not given.
        mirroring: as nnU-Net's prediction does by default.
    """

    dataset: str
    configuration: str
    trainer: str
    plans: str
    folds: Sequence[str]
    checkpoint: str
    case: str | None
    images: Sequence[Path]
    label: Path | None
    previous: Path | None
    slices: Sequence[str]
    out: Path | None
    device: str | None
    mirroring: bool


def explain(request: Request) -> Path:
    """Predict the case, look at chosen slices, and write the output folder; returns the page's path.

    Raises:
        DataError: what cannot be explained, and why: model, case, label, slices, output.
        LabelMapError: the label is damaged or of another dataset.
        WeightsError: a lean checkpoint lacks SAM's file.
    """
    started = time.perf_counter()
    wanted = read_slices(request.slices)
    device = _device(request.device)
    model = find_model(
        request.dataset, request.trainer, request.plans, request.configuration, request.folds, request.checkpoint
    )
    files = find_case(model.dataset, model.trained.dataset_json, request.case, request.images, request.label)
    previous = _previous(model, files, request.previous)
    out = Path(f"explain_{files.name}") if request.out is None else request.out
    with fresh_folder(out) as folder:
        predictor = load_predictor(model, device, request.mirroring)
        volume = read_case(predictor, files, model.classes, previous)
        check_slices(wanted or (), volume)
        measured = measure(predictor.logits_of_folds(volume.data), model.config.regions)
        result = np.asarray(predictor.label_manager.convert_logits_to_segmentation(measured.logits))
        slices = wanted or _chosen(volume, result, measured, model.classes)
        by_network = {volume.network_slice(index): index for index in slices}
        network: Any = predictor.hold_fold(0)
        centres = {index: _centre(result[index] > 0) for index in by_network}
        queries = run_windows(predictor, network, volume.data, centres, volume.spacing)
        pages = [
            _slice_page(source, volume.network_slice(source), volume, result, measured, queries, model.classes, folder)
            for source in slices
        ]
        overlays = list(_write_overlays(folder, volume, measured, queries, model))
        explanation = Explanation(
            case=files.name,
            origin=files.origin,
            files=[file.name for file in files.images],
            label=files.label.name if files.label else None,
            seen=None if request.images else fold_of(model.dataset, files.name, model.folds),
            dataset=model.dataset,
            trainer=request.trainer,
            plans=request.plans,
            configuration=request.configuration,
            folds=model.folds,
            checkpoint=model.trained.checkpoint,
            backbone=model.config.backbone,
            num_queries=model.config.num_queries,
            regions=model.classes.has_regions,
            ignored=model.classes.ignore_label is not None,
            mirrored=request.mirroring and bool(predictor.allowed_mirroring_axes),
            windows=pages[0].facts.window[1],
            grid=volume.shape,
            spacing=volume.spacing,
            source_slices=volume.source_slices,
            slice_axis=volume.slice_axis,
            directions=volume.directions,
            colours=colour_of(model.classes),
            styles=style_of(model.classes),
            slices=pages,
            chosen=wanted is None,
            overlays=overlays,
            seconds=time.perf_counter() - started,
            versions=versions(),
        )
        (folder / PAGE).write_text(render(explanation), encoding="utf-8")
        write_json(folder / RECORD, to_json(explanation, [path.name for path in folder.iterdir()]))
    return out / PAGE


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ExplainError(
            f"--device {name}: not usable here ({' '.join(str(error).split())[:120]}); use cpu, cuda or cuda:1, ..."
        ) from error
    return device


def _previous(model: Explained, files: CaseFiles, folder: Path | None) -> Path | None:
    """The label map that a cascade's second stage is given besides the image."""
    stage = previous_stage(model.trained)
    if stage is None:
        if folder is not None:
            raise ExplainError("-prev_stage_predictions: only a cascade's configuration takes them; leave them out")
        return None
    name = files.name + model.trained.dataset_json["file_ending"]
    if folder is None:
        raise ExplainError(
            f"{model.trained.name} is the second stage of a cascade: predict the case with {stage} first, and "
            f"name the folder that holds {name} with -prev_stage_predictions"
        )
    if not (folder / name).is_file():
        raise ExplainError(
            f"-prev_stage_predictions {folder}: holds no {name}; predict this case with {stage}, into this folder"
        )
    return folder / name


def _chosen(volume: Volume, result: NDArray[Any], measured: Measured, classes: Classes) -> list[int]:
    """Slices of the source that are worth showing."""
    found = result > 0
    if volume.label is not None:
        found = found | class_mask(volume.label, sorted({v for values in classes.foreground.values() for v in values}))
    per_slice = (found.sum((1, 2)), measured.entropy.sum((1, 2)))
    places = [volume.network_slice(index) for index in volume.kept]
    return [volume.kept[n] for n in choose_slices(*(values[places] for values in per_slice))]


def _centre(found: NDArray[np.bool_]) -> tuple[float, float]:
    """The middle of what was found in a slice (H, W), of the slice where nothing was."""
    places = np.argwhere(found if found.any() else np.ones_like(found))
    row, column = places.mean(axis=0)
    return float(row), float(column)


def _slice_page(
    source: int,
    index: int,
    volume: Volume,
    result: NDArray[Any],
    measured: Measured,
    queries: Queries,
    classes: Classes,
    folder: Path,
) -> SlicePage:
    mine = queries.slices[index]
    low, high = (float(value) for value in np.percentile(volume.image, (0.5, 99.8)))
    label = None if volume.label is None else volume.label[index]
    directions = volume.directions
    images = SliceImages(
        image=volume.image[index],
        label=label,
        result=result[index],
        entropy=measured.entropy[index],
        disagreement=None if measured.disagreement is None else measured.disagreement[index],
        aspect=volume.spacing[1] / volume.spacing[2],
        window=(low, high),
        directions=None if directions is None else (directions[1], directions[2]),
    )
    facts = slice_facts(source, mine, label, images.result, images.entropy, classes)
    overview = Picture(
        f"Slice {source}",
        "The image as the network sees it, "
        + ("the label, " if label is not None else "")
        + "the result of all windows and folds, and how uncertain it is.",
        draw_overview(images, mine, classes),
    )
    caption = caption_of(facts, queries_view(images, mine, facts), images.image.shape)
    drawn = Picture(f"Queries of slice {source}", caption, draw_queries(images, mine, facts, classes))
    digits = len(str(volume.source_slices - 1))
    for name, item in (("overview", overview), ("queries", drawn)):
        (folder / f"slice_{source:0{digits}d}_{name}.png").write_bytes(item.png)
    return SlicePage(facts, overview, drawn)


def caption_of(facts: SliceFacts, view: tuple[slice, slice], plane: Sequence[int]) -> str:
    """What the picture of a slice's queries shows, and what it leaves out.

    Args:
        facts: of the slice.
        view: rows and columns of the window that are drawn.
        plane: (H, W) of the whole slice.
    """
    total, shown, adding = len(facts.queries), facts.shown, facts.contributing
    return (
        f"{shown} of {total} queries shown, those that add most first; {adding} of {total} add at least "
        f"{100 * LEAST_SHARE:.0f} % of the slice's foreground score. Above each draft: class with probability, "
        f"probability of “no object”, and share.{_cut(facts, view, plane)}"
    )


def _cut(facts: SliceFacts, view: tuple[slice, slice], plane: Sequence[int]) -> str:
    rows, columns = (
        slice(part.start + start, part.stop + start) for part, start in zip(view, facts.corner[1:], strict=True)
    )
    if (rows.stop - rows.start, columns.stop - columns.start) == tuple(plane):
        return ""
    return (
        f" Cut to where there is foreground: rows {rows.start} to {rows.stop - 1}, columns {columns.start} to "
        f"{columns.stop - 1} of the network's slice."
    )


def _write_overlays(
    folder: Path, volume: Volume, measured: Measured, queries: Queries, model: Explained
) -> Iterator[Overlay]:
    names, colours = _labels(model)
    segmentation = volume.segmentation(measured.logits)
    dtype = np.uint8 if max(names) < 256 else np.uint16
    yield _volume(folder, "segmentation.nii.gz", segmentation.astype(dtype), volume, "the result, label values")
    yield _volume(
        folder, "uncertainty.nii.gz", volume.to_source(measured.entropy), volume, "entropy in bits, 32-bit numbers"
    )
    if measured.disagreement is not None:
        shows = "disagreement of folds (mutual information) in bits"
        yield _volume(folder, "disagreement.nii.gz", volume.to_source(measured.disagreement), volume, shows)
    owner = volume.to_source(queries.owner, whole_numbers=True)
    shows = (
        f"the query, from 1, that adds most to a voxel's class in the nearest window, fold {model.folds[0]}; "
        "0 where that is background"
    )
    yield _volume(folder, "queries.nii.gz", owner, volume, shows)
    count = model.config.num_queries
    query_names = {n: f"query {n}" for n in range(1, count + 1)}
    query_colours = {n: CLASS_COLOURS[(n - 1) % len(CLASS_COLOURS)] for n in query_names}
    for stem, of, table in (("segmentation", names, colours), ("queries", query_names, query_colours)):
        write_label_table(folder / f"{stem}.label", of, table)
        yield Overlay(f"{stem}.label", f"names and colours of {stem}.nii.gz for ITK-SNAP")
        write_colour_table(folder / f"{stem}.ctbl", of, table)
        yield Overlay(f"{stem}.ctbl", f"names and colours of {stem}.nii.gz for 3D Slicer")


def _volume(folder: Path, name: str, array: NDArray[Any], volume: Volume, shows: str) -> Overlay:
    try:
        write_volume(folder / name, array, volume.properties)
    except RuntimeError as error:  # ITK's
        reason = " ".join(str(error).split())[-200:]
        raise ExplainError(f"--out: cannot write {name} ({reason}); make room, or name another folder") from error
    return Overlay(name, shows)


def _labels(model: Explained) -> tuple[dict[int, str], Mapping[int, str]]:
    """Name and colour of each value that a segmentation holds."""
    values: dict[str, int] = {name: values[0] for name, values in model.classes.foreground.items()}
    if model.classes.has_regions:  # where regions overlap, the last one's value stands
        order = [int(value) for value in model.trained.dataset_json["regions_class_order"]]
        values = dict(zip(model.classes.foreground, order, strict=True))
    by_value = {value: name for name, value in sorted(values.items(), key=lambda item: item[1])}
    colours = colour_of(model.classes)
    return by_value, {value: colours[name] for value, name in by_value.items()}
