"""Synthetic volumes whose organs can be told from their surroundings by shape and place only.

Written as an nnU-Net raw dataset, so that the demo needs no download. A labelled organ never differs in intensity
alone: balls, rods and grains of the same brightness lie around it without a label. What tells them apart survives
nnU-Net's mirroring: size, lobes, direction and contact. The slices are few and thick, so that a training step takes a
second or two on a CPU. Structures are smooth functions of position in millimetres, positive inside and there about the
distance to the surface.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter, zoom

from masksam_nnunet.files import write_json

FloatArray = NDArray[np.float32]

DATASET_NAME = "Dataset901_MaskSAMPhantoms"
LABELS = {"background": 0, "organ": 1, "vessel": 2, "gland": 3}
_EDGE_MM = 0.8  # width of the blurred boundary: partial volume
_SCANNER_GAIN = 800.0
_GLAND_RADII = np.array([10.0, 7.5, 8.5])  # mm
_VESSEL_OFFSET, _GLAND_OFFSET = 0.07, -0.05  # brightness against the organ's: small beside noise and bias


@dataclass(frozen=True)
class Phantom:
    """A volume and its truth; axes are (slice, row, column) as nnU-Net reads them."""

    image: FloatArray  # (D, H, W), arbitrary scanner units, not negative
    label: NDArray[np.uint8]  # (D, H, W), values of LABELS
    spacing: tuple[float, float, float]  # millimetres
    origin: tuple[float, float, float]  # millimetres, of the first voxel


def write_phantom_dataset(folder: Path, num_cases: int = 20, seed: int = 0, num_test_cases: int = 2) -> Path:
    """Write phantoms in nnU-Net's raw format below ``folder`` and return the dataset's folder.

    ``num_cases`` are labelled; ``num_test_cases`` more go to imagesTs, without labels. Case ``i`` depends on ``seed``,
    which is not negative, and on ``i`` only.

    Raises:
        FileExistsError: the dataset's folder exists.
    """
    dataset = folder / DATASET_NAME
    dataset.mkdir(parents=True)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (dataset / name).mkdir()
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
    write_json(dataset / "dataset.json", description)
    return dataset


def make_phantom(rng: np.random.Generator) -> Phantom:
    """Draw one phantom; the same state of ``rng`` gives the same phantom."""
    shape = (4, int(rng.integers(70, 78)), int(rng.integers(70, 78)))
    in_plane = round(float(rng.uniform(0.80, 0.84)), 3)
    spacing = (round(float(rng.uniform(8.5, 9.5)), 3), in_plane, in_plane)
    first, second, third = (round(float(value), 1) for value in rng.uniform((-400, -150, -150), (400, 150, 150)))
    space = _Space(rng, shape, spacing)
    body = space.ellipsoid((0, 0, 0), (60, 29, 30))
    centre = np.array([rng.uniform(-4, 4), rng.uniform(-4, 2), rng.uniform(-11, -7)])
    radii = np.array([18.0, 14.5, 12.0]) * rng.uniform(0.88, 1.12, size=3)
    organ = space.lobed(centre, radii)
    vessel = space.vessel(centre, radii)
    # The gland sits on the organ's surface, away from the vessel.
    tilt, side = rng.uniform(-0.5, 0.5), rng.choice([-1.0, 1.0])
    on_surface = centre + radii * [np.sin(tilt), side * np.cos(tilt), -0.15]
    gland = space.ellipsoid(on_surface + np.array([0, side * 2.5, 0]), rng.uniform(0.85, 1.15, 3) * _GLAND_RADII)

    tissue, bright = rng.normal(0.42, 0.03), rng.normal(0.64, 0.03)
    image = np.full(shape, 0.03, dtype=np.float32)
    image = _paint(image, body, tissue + 0.05 * space.noise(5.0))
    clear = np.minimum(-np.maximum(np.maximum(organ, vessel), gland) - 2.5, body - 1.0)
    for inside, offset in space.distractors(centre):
        image = _paint(image, np.minimum(inside, clear), bright + offset + rng.normal(0, 0.03))
    image = _paint(image, organ, bright + 0.03 * space.noise(4.0))
    image = _paint(image, gland, bright + _GLAND_OFFSET + rng.normal(0, 0.015))
    image = _paint(image, vessel, bright + _VESSEL_OFFSET + rng.normal(0, 0.015))
    image *= np.exp(0.16 * space.noise(24.0))  # bias field
    real, imaginary = image + rng.normal(0, 0.06, shape), rng.normal(0, 0.06, shape)
    image = (_SCANNER_GAIN * rng.uniform(0.7, 1.4) * np.hypot(real, imaginary)).astype(np.float32)  # Rician noise

    label = np.zeros(shape, dtype=np.uint8)
    for name, inside in (("organ", organ), ("gland", gland), ("vessel", vessel)):
        label[inside > 0] = LABELS[name]
    return Phantom(image, label, spacing, (first, second, third))


class _Space:
    """The volume's positions in mm around its centre, turned, scaled and bent, and structures in it, all (D, H, W)."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int, int], spacing: tuple[float, float, float]
    ) -> None:
        self.rng, self.shape, self.spacing = rng, shape, spacing
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        bent = grid + 1.8 * np.stack([self.noise(11.0) for _ in range(3)])
        z, y, x = (bent - rng.uniform(-4, 4, size=(3, 1, 1, 1))) / rng.uniform(0.88, 1.1)
        angle = np.deg2rad(rng.uniform(-25, 25))
        self.place = np.stack([z, y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)])

    def noise(self, scale_mm: float) -> FloatArray:
        """Unit-variance noise with a correlation length in mm. Drawn coarsely, since it is smooth."""
        step, pad = max(scale_mm / 3, 1.0), 3  # the pad keeps the filter's border away from the volume
        coarse = [int(np.ceil(n * s / step)) + 2 * pad for n, s in zip(self.shape, self.spacing, strict=True)]
        drawn = gaussian_filter(self.rng.normal(size=coarse), scale_mm / step)[pad:-pad, pad:-pad, pad:-pad]
        drawn = (drawn - drawn.mean()) / (drawn.std() + 1e-6)
        factors = [n / c for n, c in zip(self.shape, drawn.shape, strict=True)]
        return zoom(drawn, factors, order=1, grid_mode=True, mode="nearest").astype(np.float32)

    def unit(self, centre: ArrayLike, radii: ArrayLike) -> NDArray[np.float64]:
        """Positions (3, D, H, W) from a centre, in units of radii."""
        return (self.place - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))

    def ellipsoid(self, centre: ArrayLike, radii: ArrayLike) -> NDArray[np.float64]:
        return (1 - np.linalg.norm(self.unit(centre, radii), axis=0)) * np.min(radii)

    def lobed(self, centre: ArrayLike, radii: ArrayLike) -> NDArray[np.float64]:
        """An ellipsoid whose radius swells and shrinks with direction."""
        unit = self.unit(centre, radii)
        distance = np.linalg.norm(unit, axis=0)
        azimuth, height = np.arctan2(unit[1], unit[2]), unit[0] / np.maximum(distance, 1e-3)
        equator = 1 - height**2
        first, second, third = self.rng.uniform(0, 2 * np.pi, size=3)
        lobes = (
            0.20 * np.cos(3 * azimuth + first) * equator
            + 0.10 * np.cos(2 * azimuth + second) * height * np.sqrt(equator)
            + 0.10 * np.cos(4 * height + third)
        )
        return (1 + lobes - distance) * np.min(radii)

    def vessel(self, centre: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.float64]:
        """A tube that winds through the slices beside the organ; its radius varies along it."""
        along = self.place[0]
        phase, swing = self.rng.uniform(0, 2 * np.pi, size=3), self.rng.uniform(3.0, 5.5, size=2)
        row = centre[1] + 3 + swing[0] * np.sin(along / 13 + phase[0])
        column = centre[2] + radii[2] + 5.5 + swing[1] * np.sin(along / 17 + phase[1])
        radius = 5.0 + np.sin(along / 7 + phase[2])
        tube = radius - np.hypot(self.place[1] - row, self.place[2] - column)
        return np.minimum(tube, self.rng.uniform(23, 28) - np.abs(along))

    def distractors(self, organ: NDArray[np.float64]) -> list[tuple[NDArray[np.float64], float]]:
        """Structures without a label, and the brightness of what they mimic as an offset from the organ's."""
        rng, found = self.rng, []
        for _ in range(5):  # balls: as bright as the organ, but round and smaller
            centre = rng.uniform((-24, -20, -22), (24, 20, 24))
            found.append((self.ellipsoid(centre, rng.uniform(0.9, 1.1, 3) * rng.uniform(6.0, 9.5)), 0.0))
        for _ in range(3):  # rods: as thick as the vessel, but lying in the slice plane
            angle, centre = rng.uniform(0, np.pi), rng.uniform((-24, -18, -16), (24, 18, 20))
            z, y, x = self.place - centre[:, None, None, None]
            rod = rng.uniform(4.0, 5.4) - np.hypot(z, y * np.cos(angle) + x * np.sin(angle))
            ends = rng.uniform(9, 15) - np.abs(x * np.cos(angle) - y * np.sin(angle))
            found.append((np.minimum(rod, ends), _VESSEL_OFFSET))
        for _ in range(3):  # grains: of the gland's size, but nowhere near the organ
            direction = rng.normal(size=3)
            centre = organ + direction / np.linalg.norm(direction) * rng.uniform(24, 34)
            found.append((self.ellipsoid(centre, rng.uniform(0.85, 1.15, 3) * _GLAND_RADII), _GLAND_OFFSET))
        return found


def _paint(image: FloatArray, inside: NDArray[np.floating], value: float | FloatArray) -> FloatArray:
    """Blend ``value`` over ``image`` where ``inside`` (mm) is positive, with a soft edge."""
    share = 1 / (1 + np.exp(np.clip(-4 * inside / _EDGE_MM, -30, 30)))
    return (image + share * (value - image)).astype(np.float32)


def _write(path: Path, array: NDArray[np.generic], phantom: Phantom) -> None:
    image = sitk.GetImageFromArray(array)
    # SimpleITK wants (x, y, z), arrays are (z, y, x).
    image.SetSpacing(phantom.spacing[::-1])
    image.SetOrigin(phantom.origin[::-1])
    sitk.WriteImage(image, str(path), useCompression=True)
