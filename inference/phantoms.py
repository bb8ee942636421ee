"""Write phantoms as an nnU-Net raw dataset, so that the demo needs no download."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from .phantom_shapes import LABELS, Phantom, make_phantom

DATASET_NAME = "Dataset901_MaskSAMPhantoms"


def write_phantom_dataset(folder: Path, num_cases: int = 20, seed: int = 0, num_test_cases: int = 2) -> Path:
    """Write phantoms in nnU-Net's raw format and return the dataset's folder.

    Three labelled structures (a lobed organ, a winding vessel, a gland on the organ), one image channel, 20 to 26
    slices of 58 to 64 pixels squared, about 3 x 1.1 x 1.1 mm. Case ``i`` depends on ``seed`` and ``i`` only, so that a
    larger data set with the same seed begins with the same cases.

    Args:
        folder: the folder to hold the dataset's folder, such as ``nnUNet_raw``; made if missing.
        num_cases: labelled cases in imagesTr and labelsTr; nnU-Net's five folds need at least 5.
        seed: not negative.
        num_test_cases: further cases in imagesTs, without labels.

    Raises:
        ValueError: for a number of cases below 1, or a negative seed or number of test cases.
        FileExistsError: if the dataset's folder exists.
    """
    if num_cases < 1:
        raise ValueError(f"num_cases must be at least 1, not {num_cases}")
    if num_test_cases < 0 or seed < 0:
        raise ValueError(f"num_test_cases and seed must not be negative, not {num_test_cases} and {seed}")
    dataset = Path(folder) / DATASET_NAME
    if dataset.exists():
        raise FileExistsError(f"{dataset} exists: remove it or write the phantoms elsewhere")
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (dataset / name).mkdir(parents=True)

    for index in range(num_cases + num_test_cases):
        phantom = make_phantom(np.random.default_rng([seed, index]))
        case, training = f"phantom_{index:03d}", index < num_cases
        images = dataset / ("imagesTr" if training else "imagesTs")
        _write(images / f"{case}_0000.nii.gz", np.round(phantom.image).astype(np.int16), phantom)
        if training:
            _write(dataset / "labelsTr" / f"{case}.nii.gz", phantom.label, phantom)

    description = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        "name": "MaskSAM phantoms: computed, not measured",
    }
    (dataset / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return dataset


def _write(path: Path, array: NDArray[np.generic], phantom: Phantom) -> None:
    image = sitk.GetImageFromArray(array)
    # SimpleITK wants (x, y, z), arrays are (z, y, x).
    image.SetSpacing(phantom.spacing[::-1])
    image.SetOrigin(phantom.origin[::-1])
    sitk.WriteImage(image, str(path), useCompression=True)
