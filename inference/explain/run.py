"""``masksam explain``, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.errors import ModelError, UsageError, in_short
from masksam_nnunet.files import write_json
from masksam_nnunet.plans.architecture import read_config

from ..label_maps import Classes, class_mask
from ..methods import Method
from ..models import TrainedModel, parse_folds, previous_stage, trained_models
from ..report.figures import CLASS_COLOURS, colour_of, style_of
from ..report.html import Picture, environment, number, plain
from ..versions import versions
from .case import PreparedCase, find_case, prepare_case, seen_in_training
from .figures import SliceImages, draw_overview, draw_queries
from .inside import SliceQueries, load_predictor, look_into_windows
from .measures import LEAST_SHARE, Uncertainty, measure_uncertainty, query_table, spread_slices
from .output import RECORD, fresh_folder, write_tables, write_volume

PAGE = "explain.html"
_MOST_SLICES = 24
_AXES = {"i": "first", "j": "second", "k": "third"}
_DIRECTIONS = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}


def explain(
    dataset: str,
    method: Method,
    folds: Sequence[str],
    checkpoint: str,
    case: str | None,
    *,
    images: Sequence[Path] = (),
    label: Path | None = None,
    previous: Path | None = None,
    slices: Sequence[str] = (),
    out: Path | None = None,
    device: str | None = None,
    mirroring: bool = True,
) -> Path:
    """Predict a case, look at slices of it, and write the output folder; returns the page's path.

    Args:
        dataset: number or name.
        method: the model's trainer, plans and configuration.
        folds: numbers, or "all"; the queries shown are the first one's.
        checkpoint: file name.
        case: its name.
        images: files, for an image that is no case of the dataset.
        label: the label map to show instead of the dataset's.
        previous: for a cascade, the folder with the predictions of the stage before.
        slices: numbers in the image, or "auto", which is the default.
        out: the output folder; ``explain_CASE`` if not given.
        device: PyTorch's name of it; CUDA if there is one, else the CPU, if not given.
        mirroring: whether to average mirrored predictions, as nnU-Net does by default.

    Raises:
        UsageError: an option names something that does not exist or cannot be used.
        ModelError: the model is missing, incomplete or no MaskSAM.
        DataError: the case or its label is damaged, or they do not fit together or to the model.
        MaskSAMError: a checkpoint is damaged, or SAM's file for a lean one is missing.
    """
    started = time.perf_counter()
    wanted = read_slices(slices)
    torch_device = _device(device)
    (model,) = trained_models(dataset, [method], parse_folds(folds), checkpoint)
    config, classes = _config(model), Classes.from_dataset_json(model.dataset_json)
    model.check()
    dataset, fold_names = model.folder.parent.name, [str(fold) for fold in model.folds]
    found = find_case(dataset, model.dataset_json, case, images, label)
    stage_before = _stage_before(model, found.case.name, previous)
    out = Path(f"explain_{found.case.name}") if out is None else out
    with fresh_folder(out) as folder:
        predictor = load_predictor(model, torch_device, mirroring)
        prepared = prepare_case(predictor, found, classes, stage_before)
        _check_slices(wanted or (), prepared)
        measured = measure_uncertainty(predictor.logits_of_folds(prepared.data), config.regions)
        result = np.asarray(predictor.label_manager.convert_logits_to_segmentation(measured.logits))
        chosen = wanted or _choose(prepared, result, measured)
        centres = {index: _centre(result[index] > 0) for index in map(prepared.network_slice, chosen)}
        queries, owner = look_into_windows(predictor, prepared.data, centres, prepared.spacing)
        pages = [
            _explain_slice(source, queries[prepared.network_slice(source)], prepared, result, measured, folder)
            for source in chosen
        ]
        content: dict[str, Any] = {
            "made_by": "masksam explain",
            "case": found.case.name,
            "origin": found.origin,
            "images": [file.name for file in found.case.files],
            "label": found.label.name if found.label else None,
            "seen": None if images else seen_in_training(dataset, found.case.name, fold_names),
            "dataset": dataset,
            "trainer": method.trainer,
            "plans": method.plans,
            "configuration": method.configuration,
            "folds": fold_names,
            "checkpoint": checkpoint,
            "backbone": config.backbone,
            "num_queries": config.num_queries,
            "regions": classes.has_regions,
            "ignored": classes.ignore_label is not None,
            "mirrored": mirroring and bool(predictor.allowed_mirroring_axes),
            "windows": pages[0]["window"][1],
            "grid": prepared.data.shape[1:],
            "spacing": prepared.spacing,
            "source_slices": prepared.source_slices,
            "slice_axis": prepared.slice_axis,
            "directions": prepared.directions,
            "colours": colour_of(classes),
            "styles": style_of(classes),
            "chosen": wanted is None,
            "overlays": dict(_write_overlays(folder, prepared, measured, owner, model, config.num_queries)),
            "seconds": time.perf_counter() - started,
            "versions": versions(),
        }
        (folder / PAGE).write_text(_render({**content, "slices": pages}), encoding="utf-8")
        content["slices"] = [{k: v for k, v in page.items() if k not in ("overview", "drawn")} for page in pages]
        write_json(folder / RECORD, plain({**content, "files": sorted(path.name for path in folder.iterdir())}))
    return out / PAGE


def read_slices(words: Sequence[str]) -> list[int] | None:
    """Read ``--slices``: numbers in rising order, or None for ``auto`` and for nothing.

    Raises:
        UsageError: something else, or too many.
    """
    if list(words) in ([], ["auto"]):
        return None
    wrong = [word for word in words if not (word.isascii() and word.isdecimal())]
    numbers = sorted({int(word) for word in words if word not in wrong})
    if wrong or len(numbers) > _MOST_SLICES:
        raise UsageError(f"--slices {' '.join(words)}: give at most {_MOST_SLICES} numbers from 0, or auto")
    return numbers


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(
            f"--device {name}: cannot be used here ({in_short(error)}); use cpu, cuda or cuda:1"
        ) from error
    return device


def _check_slices(wanted: Sequence[int], case: PreparedCase) -> None:
    if beyond := [index for index in wanted if index not in case.kept]:
        raise UsageError(
            f"--slices {' '.join(map(str, beyond))}: name some of {case.kept.start} to {case.kept.stop - 1}. The image "
            f"has {case.source_slices} along its axis {case.slice_axis}; the network sees no empty ones"
        )


def _config(model: TrainedModel) -> MaskSAMConfig:
    settings = PlansManager(model.plans).get_configuration(model.configuration)
    config = read_config(settings)
    if config is None:
        ours = sorted(folder.name for folder in model.folder.parent.glob("MaskSAM*__*__*"))
        raise ModelError(
            f"{model.name} holds {settings.network_arch_class_name.rsplit('.', 1)[-1]}, no MaskSAM: it has no queries. "
            f"Name a trained MaskSAM (-tr): {', '.join(ours) or 'there is none'}"
        )
    return config


def _stage_before(model: TrainedModel, case: str, folder: Path | None) -> Path | None:
    """The label map that a cascade's second stage takes besides the image."""
    stage = previous_stage(model)
    if stage is None:
        if folder is not None:
            raise UsageError(f"-prev_stage_predictions {folder}: {model.name} is no second stage of a cascade")
        return None
    file = None if folder is None else folder / (case + model.dataset_json["file_ending"])
    if file is None or not file.is_file():
        raise UsageError(
            f"-prev_stage_predictions {folder}: {model.name} is the second stage of a cascade; predict {case} with "
            f"{stage}, and name the folder of that prediction"
        )
    return file


def _choose(case: PreparedCase, result: NDArray[Any], measured: Uncertainty) -> list[int]:
    """Slices of the source that are worth showing."""
    found = result > 0
    if case.label is not None:
        found = found | class_mask(case.label, [v for values in case.classes.foreground.values() for v in values])
    places = [case.network_slice(index) for index in case.kept]
    chosen = spread_slices(found.sum((1, 2))[places], measured.entropy.sum((1, 2))[places])
    return [case.kept[n] for n in chosen]


def _centre(found: NDArray[np.bool_]) -> tuple[float, float]:
    """The middle of what was found in a slice (H, W), or of the slice where nothing was."""
    row, column = np.argwhere(found if found.any() else np.ones_like(found)).mean(axis=0)
    return float(row), float(column)


def _explain_slice(
    source: int,
    queries: SliceQueries,
    case: PreparedCase,
    result: NDArray[Any],
    measured: Uncertainty,
    folder: Path,
) -> dict[str, Any]:
    """Numbers and pictures of one slice; the pictures are written to the folder too."""
    index, classes = queries.index, case.classes
    label = None if case.label is None else case.label[index]
    low, high = (float(value) for value in np.percentile(case.image, (0.5, 99.8)))
    images = SliceImages(
        image=case.image[index],
        label=label,
        result=result[index],
        entropy=measured.entropy[index],
        disagreement=None if measured.disagreement is None else measured.disagreement[index],
        aspect=case.spacing[1] / case.spacing[2],
        window=(low, high),
        directions=case.directions and case.directions[1:],
    )
    table = query_table(queries, label, classes)
    also = "the label, " if label is not None else ""
    overview = draw_overview(images, queries, classes)
    drawn, caption = draw_queries(images, queries, table, classes)
    stem = f"slice_{source:0{len(str(case.source_slices - 1))}d}"
    (folder / f"{stem}_overview.png").write_bytes(overview)
    (folder / f"{stem}_queries.png").write_bytes(drawn)
    return {
        "source": source,
        "network": index,
        "window": queries.window,
        "corner": queries.corner,
        "size": queries.size,
        "off_centre": abs(index - queries.corner[0] - (queries.size[0] - 1) / 2),
        "foreground": int(np.count_nonzero(images.result)),
        "mean_entropy": float(images.entropy.mean()),
        "queries": table.to_dict("records"),
        "overview": Picture(
            f"Slice {source}",
            f"The image as the network sees it, {also}the result of all windows and folds, and how uncertain it is.",
            overview,
        ),
        "drawn": Picture(f"Queries of slice {source}", caption, drawn),
    }


def _write_overlays(
    folder: Path,
    case: PreparedCase,
    measured: Uncertainty,
    owner: NDArray[Any],
    model: TrainedModel,
    num_queries: int,
) -> Iterator[tuple[str, str]]:
    """Write volumes and tables for viewers; yields each file with what it shows."""
    classes = case.classes
    values = {name: values[0] for name, values in classes.foreground.items()}
    if classes.has_regions:  # where regions overlap, the last one's value stands
        values = dict(zip(values, map(int, model.dataset_json["regions_class_order"]), strict=True))
    names = {value: name for name, value in sorted(values.items(), key=lambda item: item[1])}
    colours = colour_of(classes)
    kind = np.uint8 if max(names) < 256 else np.uint16
    volumes = {
        "segmentation": (case.segmentation(measured.logits).astype(kind), "the result, label values"),
        "uncertainty": (case.to_source(measured.entropy), "entropy in bits, 32-bit numbers"),
        "queries": (
            case.to_source(owner, whole_numbers=True),
            f"the query, from 1, that adds most to a voxel's class in the nearest window, fold {model.folds[0]}; 0 "
            "where that is background",
        ),
    }
    if measured.disagreement is not None:
        shows = "disagreement of folds (mutual information) in bits"
        volumes["disagreement"] = (case.to_source(measured.disagreement), shows)
    for stem, (array, shows) in volumes.items():
        write_volume(folder / f"{stem}.nii.gz", array, case.properties)
        yield f"{stem}.nii.gz", shows
    queries = range(1, num_queries + 1)
    query_colours = {n: CLASS_COLOURS[(n - 1) % len(CLASS_COLOURS)] for n in queries}
    write_tables(folder / "segmentation", names, {value: colours[name] for value, name in names.items()})
    write_tables(folder / "queries", {n: f"query {n}" for n in queries}, query_colours)
    for stem in ("segmentation", "queries"):
        yield f"{stem}.label", f"names and colours of {stem}.nii.gz for ITK-SNAP"
        yield f"{stem}.ctbl", f"names and colours of {stem}.nii.gz for 3D Slicer"


def _render(content: Mapping[str, Any]) -> str:
    """The HTML page: everything inline, nothing fetched from elsewhere."""
    orientation = None
    if content["directions"] is not None:
        depth, rows, columns = (_DIRECTIONS[letter] for letter in content["directions"])
        orientation = f"down is {rows}, rightwards is {columns}, and slices are counted towards {depth}"
    template = environment().get_template("explain.html.j2")
    return template.render(
        e=content,
        axis_word=_AXES[content["slice_axis"]],
        orientation=orientation,
        share=lambda value: f"{100 * value:.0f} %",
        score=number(2),
        least=f"{100 * LEAST_SHARE:.0f} %",
        spacing=" × ".join(f"{step:g}" for step in content["spacing"]),
    )
