"""``masksam explain``, step by step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.errors import ModelError, UsageError
from masksam_nnunet.files import write_json
from masksam_nnunet.gpu import usable_device
from masksam_nnunet.method import MASKSAM
from masksam_nnunet.plans.architecture import read_config

from ..label_maps import Classes
from ..methods import ModelName
from ..models import TrainedModel, parse_folds, previous_stage, trained_models
from ..provenance import versions
from ..report.figures import CLASS_COLOURS, colour_of, colours_or_grey, style_of
from ..report.html import Picture, environment, number, plain
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
    method: ModelName,
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
    """Predict a case, look into slices of it, and write the output folder; returns the page's path.

    Args:
        dataset: number or name.
        method: the model's trainer, plans and configuration.
        folds: numbers, or "all"; the queries shown are the first one's.
        checkpoint: file name.
        case: its name; optional with ``images``.
        images: one file per channel, for an image outside the dataset.
        label: the label map to show instead of the dataset's.
        previous: for a cascade, the folder with the first stage's predictions.
        slices: slice numbers in the image, or "auto", the default.
        out: the output folder, ``explain_CASE`` by default.
        device: PyTorch's name; by default CUDA if there is one, else the CPU.
        mirroring: whether to average mirrored predictions.

    Raises:
        MaskSAMError: an option, the model, a checkpoint, the case or its label cannot be used.
    """
    started = time.perf_counter()
    wanted = read_slices(slices)
    torch_device = usable_device(device or "auto")
    (model,) = trained_models(dataset, [method], parse_folds(folds), checkpoint)
    model.check()  # before the config, which plans that nothing was trained with may lack
    config, classes = _config(model), Classes.from_dataset_json(model.dataset_json)
    dataset, fold_names = model.folder.parent.name, [str(fold) for fold in model.folds]
    found = find_case(dataset, model.dataset_json, case, images, label)
    seen = None if images else seen_in_training(dataset, found.case.name, fold_names)
    stage_before = _stage_before(model, found.case.name, previous)
    out = Path(f"explain_{found.case.name}") if out is None else out
    with fresh_folder(out) as folder:
        predictor = load_predictor(model, torch_device, mirroring)
        num_queries = config.queries(predictor.label_manager.num_segmentation_heads)
        prepared = prepare_case(predictor, found, classes, stage_before)
        if beyond := [index for index in wanted or () if index not in prepared.kept]:
            kept = f"{prepared.kept.start} to {prepared.kept.stop - 1}"
            raise UsageError(
                f"--slices {' '.join(map(str, beyond))}: give numbers from {kept} along axis {prepared.slice_axis}; "
                "the other slices are empty or outside the image"
            )
        measured = measure_uncertainty(predictor.logits_of_folds(prepared.data), config.regions)
        result = np.asarray(predictor.label_manager.convert_logits_to_segmentation(measured.logits))
        chosen = wanted or _choose(prepared, result, measured)
        places = {index: result[index] > 0 for index in map(prepared.network_slice, chosen)}
        queries, owner = look_into_windows(predictor, prepared.data, places, prepared.spacing)
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
            "seen": seen,
            "dataset": dataset,
            **asdict(method),
            "folds": fold_names,
            "checkpoint": checkpoint,
            "backbone": config.backbone,
            "num_queries": num_queries,
            "anchored": config.anchored,
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
            "overlays": _write_overlays(folder, prepared, measured, owner, model, num_queries),
            "seconds": time.perf_counter() - started,
            "versions": versions(),
        }
        (folder / PAGE).write_text(_render({**content, "slices": pages}), encoding="utf-8")
        content["slices"] = [{k: v for k, v in page.items() if k not in ("overview", "drawn")} for page in pages]
        write_json(folder / RECORD, plain({**content, "files": sorted(path.name for path in folder.iterdir())}))
    return out / PAGE


def draw_preprocessed(model: Path, fold: int, preprocessed: Path, case: str) -> tuple[Picture, ...]:
    """Draw the queries of up to two labelled slices of a preprocessed case; runs on the CPU, only in their windows.

    ``model`` is a folder in nnUNet_results, ``preprocessed`` the dataset's in nnUNet_preprocessed.
    """
    predictor = load_predictor(TrainedModel(model, (fold,)), torch.device("cpu"))
    settings, classes = predictor.configuration_manager, Classes.from_dataset_json(predictor.dataset_json)
    folder, spacing = str(preprocessed / settings.data_identifier), [1.0, *settings.spacing][-3:]
    data, label, _, _ = infer_dataset_class(folder)(folder, [case]).load_case(case)
    image, truth = np.asarray(data[:], np.float32), np.asarray(label[:])[0]
    shown = colours_or_grey(image, predictor.dataset_json["file_ending"])
    chosen = spread_slices((truth > 0).sum((1, 2)), np.zeros(len(truth)), count=2)
    places = {index: truth[index] > 0 for index in chosen}
    queries, owner = look_into_windows(predictor, torch.from_numpy(image), places, spacing, everywhere=False)
    pictures = []
    for index in chosen:
        table = query_table(queries[index], truth[index], classes)
        images = SliceImages.of(index, shown, truth, owner, spacing)
        drawn, caption = draw_queries(images, queries[index], table, classes)
        pictures.append(Picture(f"Slice {index} of {case}, preprocessed", caption, drawn))
    return tuple(pictures)


def read_slices(words: Sequence[str]) -> list[int] | None:
    """Read ``--slices``: at most 24 numbers, in rising order; None for ``auto`` and for nothing."""
    if list(words) in ([], ["auto"]):
        return None
    numbers = sorted({int(word) for word in words if word.isascii() and word.isdecimal()})
    if len(numbers) < len(set(words)) or len(numbers) > _MOST_SLICES:
        raise UsageError(f"--slices {' '.join(words)}: give at most {_MOST_SLICES} numbers from 0, or auto")
    return numbers


def _config(model: TrainedModel) -> MaskSAMConfig:
    settings = PlansManager(model.plans).get_configuration(model.configuration)
    config = read_config(settings)
    if config is None or config.method != MASKSAM:
        ours = ", ".join(sorted(folder.name for folder in model.folder.parent.glob("MaskSAM*__*__*")))
        network = config.method if config else settings.network_arch_class_name.rsplit(".", 1)[-1]
        raise ModelError(f"{model.name} is a {network} without queries; give -tr of a MaskSAM: {ours or 'none here'}")
    return config


def _stage_before(model: TrainedModel, case: str, folder: Path | None) -> Path | None:
    """The first stage's label map of the case, for the second stage of a cascade."""
    stage = previous_stage(model)
    if stage is None:
        return None
    file = (folder or Path()) / (case + model.dataset_json["file_ending"])
    if folder is None or not file.is_file():
        raise UsageError(f"-prev_stage_predictions {folder}: give the folder of {stage}'s prediction of {case}")
    return file


def _choose(case: PreparedCase, result: NDArray[Any], measured: Uncertainty) -> list[int]:
    """Choose the source's slices to show."""
    found = result > 0
    if case.label is not None:
        found = found | np.isin(case.label, [v for values in case.classes.foreground.values() for v in values])
    places = [case.network_slice(index) for index in case.kept]
    chosen = spread_slices(found.sum((1, 2))[places], measured.entropy.sum((1, 2))[places])
    return [case.kept[n] for n in chosen]


def _explain_slice(
    source: int,
    queries: SliceQueries,
    case: PreparedCase,
    result: NDArray[Any],
    measured: Uncertainty,
    folder: Path,
) -> dict[str, Any]:
    """Return the page's entry for one slice, and write its pictures."""
    index = queries.index
    images = SliceImages.of(index, case.shown, case.label, result, case.spacing)
    entropy = measured.entropy[index]
    maps = {"uncertainty (entropy)": entropy}
    if measured.disagreement is not None:
        maps["disagreement of folds"] = measured.disagreement[index]
    table = query_table(queries, images.label, case.classes)
    overview = draw_overview(images, queries, case.classes, maps, case.directions and case.directions[1:])
    drawn, caption = draw_queries(images, queries, table, case.classes)
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
        "mean_entropy": float(entropy.mean()),
        "queries": table.to_dict("records"),
        "overview": Picture(f"Slice {source}", "The result averages all windows and folds.", overview),
        "drawn": Picture(f"Queries of slice {source}", caption, drawn),
    }


def _write_overlays(
    folder: Path, case: PreparedCase, measured: Uncertainty, owner: NDArray[Any], model: TrainedModel, num_queries: int
) -> dict[str, str]:
    """Write volumes and tables for viewers; returns what each file shows."""
    classes = case.classes
    values = {name: values[0] for name, values in classes.foreground.items()}
    if classes.has_regions:  # where regions overlap, the last one's value stands
        values = dict(zip(values, map(int, model.dataset_json["regions_class_order"]), strict=True))
    names = {value: name for name, value in sorted(values.items(), key=lambda item: item[1])}
    kind = np.uint8 if max(names) < 256 else np.uint16
    used = case.predictor
    managers = (used.plans_manager, used.configuration_manager, used.label_manager)
    segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
        measured.logits, *managers, dict(case.properties), num_threads_torch=torch.get_num_threads()
    )
    volumes = {
        "segmentation": (segmentation.astype(kind), "the result, label values"),
        "uncertainty": (case.to_source(measured.entropy), "entropy in bits, 32-bit numbers"),
        "queries": (
            case.to_source(owner, whole_numbers=True),
            f"the query, from 1, that adds most to a voxel's class in fold {model.folds[0]}; 0: background",
        ),
    }
    if measured.disagreement is not None:
        volumes["disagreement"] = (case.to_source(measured.disagreement), "disagreement of folds in bits")
    for stem, (array, _) in volumes.items():
        write_volume(folder / f"{stem}.nii.gz", array, case.properties)
    colours, queries = colour_of(classes), range(1, num_queries + 1)
    query_colours = {n: CLASS_COLOURS[(n - 1) % len(CLASS_COLOURS)] for n in queries}
    write_tables(folder / "segmentation", names, {value: colours[name] for value, name in names.items()})
    write_tables(folder / "queries", {n: f"query {n}" for n in queries}, query_colours)
    shown = {f"{stem}.nii.gz": shows for stem, (_, shows) in volumes.items()}
    for stem in ("segmentation", "queries"):
        shown[f"{stem}.label"] = f"names and colours of {stem}.nii.gz for ITK-SNAP"
        shown[f"{stem}.ctbl"] = f"names and colours of {stem}.nii.gz for 3D Slicer"
    return shown


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
