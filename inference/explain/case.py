"""Find the case to explain, read it as the network sees it, and bring results back to the image's grid."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nibabel import aff2axcodes
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from numpy.typing import NDArray
from torch import Tensor

from masksam_nnunet.errors import CaseError, DataError, UsageError
from masksam_nnunet.files import read_json
from masksam_nnunet.plans.images import ImageGeometry
from masksam_nnunet.plans.splits import SPLITS_FILE, read_splits

from ..cases import Case, channel_names, find_cases, preprocess_case
from ..label_maps import Classes, read_label_map
from ..predictor import MaskSAMPredictor
from ..report.figures import colours_or_grey
from .output import affine_of


@dataclass(frozen=True)
class FoundCase:
    """A case's images, its label map if there is one, and where the page says they come from."""

    case: Case
    label: Path | None
    origin: str


def find_case(
    dataset: str, description: Mapping[str, Any], name: str | None, images: Sequence[Path], label: Path | None
) -> FoundCase:
    """Find a case of the raw dataset, or take ``images``.

    Args:
        dataset: name of its folder in nnUNet_raw.
        description: the model's dataset.json.
        name: the case; optional where ``images`` are given.
        images: one file per channel.
        label: the label map to show instead of the dataset's own.

    Raises:
        UsageError: the case is unknown, or a file is missing.
    """
    for option, files in (("--image", images), ("--label", [label] if label else [])):
        if missing := [file for file in files if not file.is_file()]:
            raise UsageError(f"{option} {missing[0]}: there is no such file")
    if images:
        channels = channel_names(description)
        if len(images) > len(channels):
            raise UsageError(f"--image: {len(images)} files, but the model was trained on {', '.join(channels)}")
        name = name or re.sub(r"(_0000)?(\.nii)?\.[^.]+$", "", images[0].name)
        if Path(name).name != name or name in ("", ".", ".."):
            raise UsageError(f"CASE {name!r}: give a plain name, without folders")
        return FoundCase(Case(name, tuple(images), numbered=False), label, "files given with --image")
    if name is None:
        raise UsageError("no CASE: name one of the dataset, or give its files with --image")
    cases = _cases_of(dataset, description)
    if name not in cases:
        near = difflib.get_close_matches(name, cases, n=5, cutoff=0.5) or sorted(cases)[:5]
        raise UsageError(f"CASE {name!r} is not in {dataset}; similar: {', '.join(near)}. Other files need --image")
    return dataclasses.replace(cases[name], label=label or cases[name].label)


def seen_in_training(dataset: str, case: str, folds: Sequence[str]) -> str | None:
    """Say for each fold whether the split has the case in its training set; None where there is no split."""
    file = Path(os.environ.get("nnUNet_preprocessed", "")) / dataset / SPLITS_FILE
    if not file.is_file():
        return None
    splits = read_splits(file)
    training = {str(fold): split["train"] for fold, split in enumerate(splits)}
    training["all"] = [name for split in splits for part in ("train", "val") for name in split[part]]
    if unknown := [fold for fold in folds if fold not in training]:
        return f"perhaps in the training set of fold {' and '.join(unknown)}, which {file.name} does not hold"
    return " and ".join(
        f"{'in' if case in training[fold] else 'outside'} the training set of fold {fold}" for fold in folds
    )


def _cases_of(dataset: str, description: Mapping[str, Any]) -> dict[str, FoundCase]:
    """The cases in imagesTs and imagesTr, or those that the raw dataset.json lists itself."""
    if not os.environ.get("nnUNet_raw"):
        raise UsageError("nnUNet_raw is not set: export it, or give the case's files with --image")
    folder, ending = Path(os.environ["nnUNet_raw"]) / dataset, description["file_ending"]
    file = folder / "dataset.json"
    listed = read_json(file) if file.is_file() else {}
    if "dataset" in listed:
        entries = get_filenames_of_train_images_and_targets(str(folder), listed)
        found = [
            (Case(name, tuple(map(Path, entry["images"])), numbered=False), Path(entry["label"]), str(file))
            for name, entry in entries.items()
        ]
    else:
        numbered = f"*_[0-9][0-9][0-9][0-9]{ending}"
        parts = [part for part in ("imagesTs", "imagesTr") if any((folder / part).glob(numbered))]
        found = [
            (case, folder / part.replace("images", "labels") / f"{case.name}{ending}", f"{part} of {dataset}")
            for part in parts
            for case in find_cases(folder / part, ending)[0]
        ]
    return {case.name: FoundCase(case, label if label.is_file() else None, origin) for case, label, origin in found}


# ---- the network's grid ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCase:
    """A case on the network's grid (D, H, W): transposed, cropped to what is not zero, resampled."""

    data: Tensor  # (C, D, H, W) float32, the network's input
    shown: NDArray[np.floating[Any]]  # (D, H, W), or (D, H, W, 3) with colours
    label: NDArray[np.int16] | None  # (D, H, W) label values
    spacing: tuple[float, float, float]  # millimetres along (D, H, W)
    kept: range  # the source's slices that the network sees; the others are zero
    source_slices: int  # number of slices of the source
    slice_axis: str  # the source's voxel axis across slices: i, j or k
    directions: list[str] | None  # where rising indices along (D, H, W) lead (L R A P S I), if known
    classes: Classes
    properties: Mapping[str, Any]  # nnU-Net's, of the source
    predictor: MaskSAMPredictor

    def network_slice(self, index: int) -> int:
        """The network's slice whose centre is nearest to that of a source's slice."""
        place = (index - self.kept.start + 0.5) * self.data.shape[1] / len(self.kept)
        return min(int(place), self.data.shape[1] - 1)

    def to_source(self, array: NDArray[Any], whole_numbers: bool = False) -> NDArray[Any]:
        """Bring (D, H, W) to the source's grid by nnU-Net's resampling; 0 outside the crop."""
        settings, plans = self.predictor.configuration_manager, self.predictor.plans_manager
        resample = settings.resampling_fn_seg if whole_numbers else settings.resampling_fn_probabilities
        shape = self.properties["shape_after_cropping_and_before_resampling"]
        original = [float(self.properties["spacing"][axis]) for axis in plans.transpose_forward]
        back = np.asarray(resample(array[None].astype(np.float32), shape, list(self.spacing), original))[0]
        full = np.zeros(self.properties["shape_before_cropping"], np.float32)
        full = insert_crop_into_image(full, back, self.properties["bbox_used_for_cropping"])
        full = full.transpose(plans.transpose_backward)
        return np.rint(full).astype(array.dtype) if whole_numbers else full


def prepare_case(
    predictor: MaskSAMPredictor, found: FoundCase, classes: Classes, previous: Path | None
) -> PreparedCase:
    """Read and preprocess a case as nnU-Net does for prediction, and its label as for training.

    ``previous`` is a cascade's label map of the first stage.

    Raises:
        DataError: an image or the label is damaged, or they do not fit together or to the model.
    """
    plans, settings = predictor.plans_manager, predictor.configuration_manager
    try:
        data, properties = preprocess_case(found.case, previous, plans, settings, predictor.dataset_json, verbose=False)
    except CaseError as error:
        raise DataError(f"case {found.case.name!r}: {error}") from error
    forward = [int(axis) for axis in plans.transpose_forward]
    original = [float(properties["spacing"][axis]) for axis in forward]
    depth, height, width = (original[:1] + [float(step) for step in settings.spacing])[-3:]  # 2D keeps slices' distance
    label, crop = None, [slice(*map(int, edges)) for edges in properties["bbox_used_for_cropping"]]
    if found.label is not None:
        truth = _read_label(found.label, predictor, properties).transpose(forward)[*crop]
        resampled = settings.resampling_fn_seg(
            truth[None].astype(np.float32), data.shape[1:], original, [depth, height, width]
        )
        label = np.rint(np.asarray(resampled)[0]).astype(np.int16)
    affine = affine_of(properties)
    return PreparedCase(
        data=torch.from_numpy(data),
        shown=colours_or_grey(data, predictor.dataset_json["file_ending"]),
        label=label,
        spacing=(depth, height, width),
        kept=range(crop[0].start, crop[0].stop),
        source_slices=int(properties["shape_before_cropping"][0]),
        slice_axis="kji"[forward[0]],
        directions=None if affine is None else [str(aff2axcodes(affine)[2 - axis]) for axis in forward],
        classes=classes,
        properties=properties,
        predictor=predictor,
    )


def _read_label(file: Path, predictor: MaskSAMPredictor, properties: Mapping[str, Any]) -> NDArray[np.integer[Any]]:
    """The label map on the source's grid, (D, H, W) of nnU-Net's reader."""
    ending = predictor.dataset_json["file_ending"]
    if not file.name.endswith(ending):
        raise UsageError(f"--label {file}: must end in {ending!r}, as all files of this dataset")
    read = read_label_map(file.parent, file.name.removesuffix(ending), predictor.dataset_json)
    shape = [int(properties["shape_before_cropping"][axis]) for axis in predictor.plans_manager.transpose_backward]
    if difference := ImageGeometry.of(np.broadcast_to(0, (1, *shape)), properties).difference(read.grid):
        what, one, other = difference
        raise DataError(f"{file}: its {what} is {other}, the image's {one}; give the image's own label map (--label)")
    return read.labels
