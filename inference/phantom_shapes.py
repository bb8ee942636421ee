"""One synthetic volume: organs that can be told from their surroundings by shape and place only.

Everything is a smooth function of position in millimetres, positive inside a structure and close to the distance from
its boundary there. A labelled organ never differs in intensity alone: rods, balls and a tissue of the same brightness
lie around it without a label. What tells them apart survives nnU-Net's mirroring: size, lobes, direction and contact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

FloatArray = NDArray[np.float32]

LABELS = {"background": 0, "organ": 1, "vessel": 2, "gland": 3}
"""``labels`` of the phantoms' dataset.json."""

_EDGE_MM = 0.8  # width of the blurred boundary: partial volume
_SCANNER_GAIN = 800.0
_GLAND_RADII = (9.0, 6.0, 7.5)  # mm
_VESSEL_OFFSET, _GLAND_OFFSET = 0.07, -0.05  # brightness against the organ's: small beside noise and bias


@dataclass(frozen=True)
class Phantom:
    """A volume and its truth; axes are (slice, row, column) as nnU-Net reads them.

    Attributes:
        image: (D, H, W) float32, arbitrary scanner units, not negative.
        label: (D, H, W) uint8, values of :data:`LABELS`.
        spacing: millimetres along (slice, row, column).
        origin: millimetres, position of the first voxel along (slice, row, column).
    """

    image: FloatArray
    label: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]


def make_phantom(rng: np.random.Generator) -> Phantom:
    """Draw one phantom; the same state of ``rng`` gives the same phantom."""
    shape = (int(rng.integers(20, 27)), int(rng.integers(58, 65)), int(rng.integers(58, 65)))
    in_plane = float(np.round(rng.uniform(1.05, 1.18), 3))
    spacing = (float(np.round(rng.uniform(2.7, 3.3), 3)), in_plane, in_plane)
    origin = (
        float(np.round(rng.uniform(-400, 400), 1)),
        float(np.round(rng.uniform(-150, 150), 1)),
        float(np.round(rng.uniform(-150, 150), 1)),
    )
    place = _positions(rng, shape, spacing)

    body, organ, vessel, gland, organ_centre = _anatomy(rng, place)
    labelled = np.maximum(np.maximum(organ, vessel), gland)
    distractors = _distractors(rng, place, labelled, organ_centre)
    image = _render(rng, spacing, body, organ, vessel, gland, distractors)

    label = np.zeros(shape, dtype=np.uint8)
    label[organ > 0] = LABELS["organ"]
    label[vessel > 0] = LABELS["vessel"]
    label[(gland > 0) & (vessel <= 0)] = LABELS["gland"]
    return Phantom(image, label, spacing, origin)


def _positions(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> FloatArray:
    """Coordinates (3, D, H, W) in mm around the centre, in the phantom's own turned, scaled and bent frame."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    bend = np.stack([_smooth_noise(rng, shape, spacing, 11.0) for _ in range(3)]) * 1.8
    turn = _rotation(rng, about_slice=25.0, about_plane=8.0)
    shift = rng.uniform(-4, 4, size=3)
    moved = (grid + bend - shift[:, None, None, None]) / rng.uniform(0.88, 1.1)
    return np.einsum("ij,jdhw->idhw", turn, moved).astype(np.float32)


def _anatomy(
    rng: np.random.Generator, place: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, NDArray[np.float64]]:
    """Body, organ, vessel and gland, and the organ's centre in mm."""
    body = _ellipsoid(place, (0, 0, 0), (60, 29, 30))

    centre = np.array([rng.uniform(-4, 4), rng.uniform(-4, 2), -9.0 + rng.uniform(-2, 2)])
    radii = np.array([18.0, 14.5, 12.0]) * rng.uniform(0.88, 1.12, size=3)
    organ = _lobed(rng, place, centre, radii)

    # The vessel runs through the slices beside the organ and swings; its radius varies along it.
    along = place[0]
    phase, swing = rng.uniform(0, 2 * np.pi, size=2), rng.uniform(3.0, 5.5, size=2)
    row = centre[1] + 3 + swing[0] * np.sin(along / 13 + phase[0])
    column = centre[2] + radii[2] + 5.5 + swing[1] * np.sin(along / 17 + phase[1])
    radius = 4.2 + 1.0 * np.sin(along / 7 + rng.uniform(0, 2 * np.pi))
    half_length = rng.uniform(23, 28)
    vessel = radius - np.hypot(place[1] - row, place[2] - column)
    vessel = np.minimum(vessel, half_length - np.abs(along))

    # The gland sits on the organ's surface, away from the vessel.
    tilt = rng.uniform(-0.5, 0.5)
    side = 1.0 if rng.random() < 0.5 else -1.0
    on_surface = centre + radii * np.array([np.sin(tilt), side * np.cos(tilt), -0.15])
    gland = _ellipsoid(place, on_surface + np.array([0, side * 2.5, 0]), rng.uniform(0.85, 1.15, 3) * _GLAND_RADII)

    return body, organ, vessel.astype(np.float32), gland, centre


def _distractors(
    rng: np.random.Generator, place: FloatArray, labelled: FloatArray, organ_centre: NDArray[np.float64]
) -> list[tuple[FloatArray, float]]:
    """Structures without a label and without contact to one, each with the brightness of what it mimics, as an offset
    from the organ's."""
    clear = -labelled - 2.5
    found: list[tuple[FloatArray, float]] = []
    # Balls: the organ's brightness, but round, smaller, and at a distance.
    for _ in range(7):
        centre = rng.uniform((-24, -20, -22), (24, 20, 24))
        found.append((_ellipsoid(place, centre, rng.uniform(0.9, 1.1, 3) * rng.uniform(6.0, 9.5)), 0.0))
    # Rods: as thick as the vessel, but lying in the slice plane.
    for _ in range(5):
        angle = rng.uniform(0, np.pi)
        centre = rng.uniform((-24, -18, -16), (24, 18, 20))
        across = (place[1] - centre[1]) * np.cos(angle) + (place[2] - centre[2]) * np.sin(angle)
        length = (place[2] - centre[2]) * np.cos(angle) - (place[1] - centre[1]) * np.sin(angle)
        rod = rng.uniform(3.2, 4.6) - np.hypot(place[0] - centre[0], across)
        found.append((np.minimum(rod, rng.uniform(9, 15) - np.abs(length)), _VESSEL_OFFSET))
    # Grains: the gland's size and brightness, but nowhere near the organ.
    for _ in range(5):
        direction = rng.normal(size=3)
        centre = organ_centre + direction / np.linalg.norm(direction) * rng.uniform(24, 34)
        found.append((_ellipsoid(place, centre, rng.uniform(0.85, 1.15, 3) * _GLAND_RADII), _GLAND_OFFSET))
    return [(np.minimum(inside, clear).astype(np.float32), offset) for inside, offset in found]


def _render(
    rng: np.random.Generator,
    spacing: tuple[float, float, float],
    body: FloatArray,
    organ: FloatArray,
    vessel: FloatArray,
    gland: FloatArray,
    distractors: list[tuple[FloatArray, float]],
) -> FloatArray:
    """Brightness, texture, bias field and Rician noise; (D, H, W) float32."""
    shape = body.shape
    tissue, bright = rng.normal(0.42, 0.03), rng.normal(0.64, 0.03)
    image = np.full(shape, 0.03, dtype=np.float32)
    image = _paint(image, body, tissue + 0.05 * _smooth_noise(rng, shape, spacing, 5.0))
    for inside, offset in distractors:
        image = _paint(image, np.minimum(inside, body - 1.0), bright + offset + rng.normal(0, 0.03))
    image = _paint(image, organ, bright + 0.03 * _smooth_noise(rng, shape, spacing, 4.0))
    image = _paint(image, gland, bright + _GLAND_OFFSET + rng.normal(0, 0.015))
    image = _paint(image, vessel, bright + _VESSEL_OFFSET + rng.normal(0, 0.015))

    image *= np.exp(0.16 * _smooth_noise(rng, shape, spacing, 24.0))
    sigma = rng.uniform(0.05, 0.07)
    real = image + rng.normal(0, sigma, shape)
    imaginary = rng.normal(0, sigma, shape)
    return (_SCANNER_GAIN * rng.uniform(0.7, 1.4) * np.hypot(real, imaginary)).astype(np.float32)


def _paint(image: FloatArray, inside: FloatArray, value: float | FloatArray) -> FloatArray:
    """Blend ``value`` over ``image`` where ``inside`` (mm) is positive, with a soft edge."""
    share = 1 / (1 + np.exp(np.clip(-4 * inside / _EDGE_MM, -30, 30)))
    return (image + share * (value - image)).astype(np.float32)


def _ellipsoid(place: FloatArray, centre: object, radii: object) -> FloatArray:
    """About the distance in mm to the surface of an ellipsoid, positive inside; (D, H, W)."""
    centre, radii = np.asarray(centre, dtype=np.float32), np.asarray(radii, dtype=np.float32)
    unit = (place - centre[:, None, None, None]) / radii[:, None, None, None]
    result: FloatArray = ((1 - np.linalg.norm(unit, axis=0)) * radii.min()).astype(np.float32)
    return result


def _lobed(
    rng: np.random.Generator, place: FloatArray, centre: NDArray[np.float64], radii: NDArray[np.float64]
) -> FloatArray:
    """An ellipsoid whose radius swells and shrinks with direction, so that it has lobes; (D, H, W) in mm."""
    unit = (place - centre[:, None, None, None]) / radii[:, None, None, None]
    distance = np.linalg.norm(unit, axis=0)
    azimuth = np.arctan2(unit[1], unit[2])
    height = unit[0] / np.maximum(distance, 1e-3)
    equator = 1 - height**2
    first, second, third = rng.uniform(0, 2 * np.pi, size=3)
    lobes = (
        0.20 * np.cos(3 * azimuth + first) * equator
        + 0.10 * np.cos(2 * azimuth + second) * height * np.sqrt(equator)
        + 0.10 * np.cos(4 * height + third)
    )
    result: FloatArray = ((1 + lobes - distance) * radii.min()).astype(np.float32)
    return result


def _smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, float, float], scale_mm: float
) -> FloatArray:
    """Unit-variance noise with a correlation length in mm; (D, H, W). Drawn coarsely, since it is smooth."""
    step = max(scale_mm / 3, 1.0)
    pad = 3  # keeps the filter's border away from the volume
    coarse = [int(np.ceil(n * s / step)) + 2 * pad for n, s in zip(shape, spacing, strict=True)]
    noise = gaussian_filter(rng.normal(size=coarse), scale_mm / step)
    noise = noise[pad:-pad, pad:-pad, pad:-pad]
    noise = (noise - noise.mean()) / (noise.std() + 1e-6)
    fine = zoom(
        noise, [n / c for n, c in zip(shape, noise.shape, strict=True)], order=1, grid_mode=True, mode="nearest"
    )
    return fine.astype(np.float32)


def _rotation(rng: np.random.Generator, about_slice: float, about_plane: float) -> NDArray[np.float64]:
    """A random rotation (3, 3): at most so many degrees about the slice axis, and about each in-plane axis."""
    result = np.eye(3)
    for axis, limit in ((0, about_slice), (1, about_plane), (2, about_plane)):
        angle = np.deg2rad(rng.uniform(-limit, limit))
        first, second = (i for i in range(3) if i != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result
