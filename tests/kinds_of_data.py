"""Small raw datasets of every kind that nnU-Net accepts: balls in noise, with the traps of real data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

OBLIQUE = (0.9396926, -0.3368241, 0.0593912, 0.3420201, 0.9254166, -0.1631759, 0.0, 0.1736482, 0.9848078)


@dataclass
class Kind:
    """A raw dataset to write.

    Attributes:
        id: its number.
        name: the rest of its name.
        sizes: (D, H, W) of each case.
        labels: of dataset.json.
        values: foreground label values, drawn as balls.
        channels: image channels.
        spacing: (x, y, z) in mm.
        ending: of its files.
        empty: indices of cases without any foreground.
        ignored: the ignore label, drawn over a corner.
        more: further entries of dataset.json.
        case: its cases' names, with the number's place.
    """

    id: int
    name: str
    sizes: Sequence[tuple[int, int, int]]
    labels: dict[str, Any]
    values: Sequence[int]
    channels: int = 1
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ending: str = ".nii.gz"
    empty: Sequence[int] = ()
    ignored: int | None = None
    more: dict[str, Any] = field(default_factory=dict)
    case: str = "case_{:02d}"

    @property
    def dataset(self) -> str:
        return f"Dataset{self.id:03d}_{self.name}"

    @property
    def cases(self) -> list[str]:
        return [self.case.format(index) for index in range(len(self.sizes))]

    def write(self, raw: Path) -> Path:
        """Write it below nnUNet_raw."""
        folder = raw / self.dataset
        rng = np.random.default_rng(self.id)
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for index, (case, size) in enumerate(zip(self.cases, self.sizes, strict=True)):
            labels = np.zeros(size, np.uint8)
            if index not in self.empty:
                for value in self.values:
                    _draw_ball(labels, value, rng)
            image = rng.normal(0, 0.3, (self.channels, *size)) + labels / max(self.values)
            if self.ignored is not None:
                labels[..., : size[1] // 4, : size[2] // 4] = self.ignored
            if self.ending == ".png":
                _write_picture(folder, case, image, labels)
            else:
                _write_volume(folder, case, image, labels, self.spacing)
        description = {
            "channel_names": {str(c): f"channel {c}" for c in range(self.channels)},
            "labels": self.labels,
            "numTraining": len(self.sizes),
            "file_ending": self.ending,
            **self.more,
        }
        (folder / "dataset.json").write_text(json.dumps(description))
        return folder

    def write_fingerprint(self, preprocessed: Path) -> Path:
        """What nnUNetv2_extract_fingerprint would write; the dataset's folder below nnUNet_preprocessed."""
        folder = preprocessed / self.dataset
        folder.mkdir()
        content = {
            "spacings": [list(self.spacing[::-1])] * len(self.sizes),
            "shapes_after_crop": [list(size) for size in self.sizes],
            "foreground_intensity_properties_per_channel": {},
            "median_relative_size_after_cropping": 1.0,
        }
        (folder / "dataset_fingerprint.json").write_text(json.dumps(content))
        return folder


def _draw_ball(labels: NDArray[np.uint8], value: int, rng: np.random.Generator) -> None:
    shape = np.array(labels.shape)
    radius = np.maximum(1.0, shape * rng.uniform(0.12, 0.22))
    centre = rng.uniform(0.3, 0.7, 3) * (shape - 1)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    labels[(((grid - centre) / radius) ** 2).sum(-1) <= 1] = value


def _write_volume(
    folder: Path, case: str, image: NDArray[Any], labels: NDArray[np.uint8], spacing: tuple[float, float, float]
) -> None:
    arrays = {f"imagesTr/{case}_{c:04d}": channel.astype(np.float32) for c, channel in enumerate(image)}
    for name, array in {**arrays, f"labelsTr/{case}": labels}.items():
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing(spacing)
        volume.SetOrigin((-17.5, 3.25, 120.0))
        volume.SetDirection(OBLIQUE)
        sitk.WriteImage(volume, str(folder / f"{name}.nii.gz"))


def _write_picture(folder: Path, case: str, image: NDArray[Any], labels: NDArray[np.uint8]) -> None:
    """A colour image in one file; (3, 1, H, W)."""
    scaled = np.clip((image[:, 0] + 1) * 100, 0, 255).astype(np.uint8)
    sitk.WriteImage(
        sitk.GetImageFromArray(np.moveaxis(scaled, 0, -1), isVector=True), str(folder / f"imagesTr/{case}_0000.png")
    )
    sitk.WriteImage(sitk.GetImageFromArray(labels[0]), str(folder / f"labelsTr/{case}.png"))


def assert_like_the_input(images: Path, predictions: Path, kind: Kind) -> None:
    """Every image has its prediction, on its own grid, with labels of the dataset only."""
    files = sorted(images.glob(f"*_0000{kind.ending}"))
    assert files
    for file in files:
        source = sitk.ReadImage(str(file))
        result = sitk.ReadImage(str(predictions / file.name.replace("_0000", "")))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(
                getattr(result, geometry)(), getattr(source, geometry)(), atol=1e-4, err_msg=f"{file.name} {geometry}"
            )
        assert set(np.unique(sitk.GetArrayFromImage(result)).tolist()) <= {0, *kind.values}
