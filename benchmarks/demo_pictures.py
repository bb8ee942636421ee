"""Choose the demo's pictures and caption them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from masksam_nnunet.inference.explain.inside import look_inside
from masksam_nnunet.inference.history import History
from masksam_nnunet.inference.label_maps import Classes, read_label_map, read_volume
from masksam_nnunet.inference.report.case_choice import choose_cases
from masksam_nnunet.inference.report.figures import CaseImages, colour_of, draw_case, draw_inside
from masksam_nnunet.inference.report.html import Picture
from masksam_nnunet.plans.raw_data import RawDataset

from .plots import draw_curves


@dataclass(frozen=True)
class Pictures:
    """All pictures of a report, and the colour of each class in them."""

    colours: Mapping[str, str]
    curves: Picture
    cases: list[Picture]
    inside: list[Picture]


def draw_pictures(
    *,
    dataset: RawDataset,
    classes: Classes,
    folds: Mapping[str, Path],
    histories: Mapping[str, History],
    ranking: Mapping[str, float],
    preprocessed: Path,
    masksam: str,
) -> Pictures:
    """Draw curves, validation cases and MaskSAM's prompts.

    Args:
        dataset: the raw dataset, for images as they are.
        classes: of the dataset.
        folds: the trained fold's folder of each method, MaskSAM last.
        histories: of each method.
        ranking: MaskSAM's mean Dice of each validation case.
        preprocessed: the dataset's folder in nnUNet_preprocessed.
        masksam: MaskSAM's name in ``folds``.
    """
    chosen = choose_cases(ranking)
    cases = []
    for case, place in chosen.items():
        images = _read_case(dataset, folds, preprocessed, case, masksam)
        caption = f"{place} by the mean Dice of {masksam} ({_dice(ranking[case])}). All columns share one grey window."
        cases.append(Picture(case, caption, draw_case(images, classes)))
    inside = []
    for case in list(chosen)[1:] or list(chosen):  # the median and the best: prompts that do something
        fold = folds[masksam]
        view = look_inside(fold.parent, int(fold.name.removeprefix("fold_")), preprocessed, case, classes)
        caption = "The patch around the labelled structures as the network sees it: preprocessed and normalised."
        inside.append(Picture(case, caption, draw_inside(view, classes)))
    curves = Picture(
        "Learning curves",
        "Dice is nnU-Net's estimate on random validation patches, once per epoch, on the same scale for both methods. "
        "Losses are not comparable between the two: MaskSAM's training loss sums its matching terms.",
        draw_curves(histories),
    )
    return Pictures(colour_of(classes), curves, cases, inside)


def _read_case(
    dataset: RawDataset, folds: Mapping[str, Path], preprocessed: Path, case: str, masksam: str
) -> CaseImages:
    image, _ = read_volume(dataset.images[case], dataset.dataset_json)
    truth = read_label_map(preprocessed / "gt_segmentations", case, dataset.dataset_json)
    predictions = {
        name: read_label_map(fold / "validation", case, dataset.dataset_json).labels for name, fold in folds.items()
    }
    return CaseImages(image[0], truth.spacing, truth.labels, predictions, masksam)


def _dice(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"
