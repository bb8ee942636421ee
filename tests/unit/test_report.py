"""Pictures of cases, and texts for a page."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from masksam_nnunet.files import write_json
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.report.figures import (
    CaseImages,
    choose_slices,
    colours_or_grey,
    draw_case,
    surroundings,
    wrapped,
)
from masksam_nnunet.inference.report.html import breakable, number, pieces, plain

CLASSES = Classes({"<b>liver & $co$</b>": (1,), "vessel": (2,)}, has_regions=False, ignore_label=None)


def made_up_case() -> CaseImages:
    truth = np.zeros((6, 40, 50), dtype=int)
    truth[1:5, 10:20, 10:25] = 1
    truth[2, 22:26, 12:18] = 2
    worse = np.roll(truth, 4, axis=2)
    worse[4] = 0
    image = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32) + truth
    return CaseImages(image, (3.0, 1.0, 1.0), truth, {"nnU-Net": truth, "MaskSAM": worse}, "MaskSAM")


def test_slices_show_the_structures_and_the_errors() -> None:
    images = made_up_case()
    assert choose_slices(images, CLASSES) == [(2, "most labelled voxels"), (4, "most errors")]
    perfect = CaseImages(images.image, images.spacing, images.truth, {"MaskSAM": images.truth}, "MaskSAM")
    assert [index for index, _ in choose_slices(perfect, CLASSES)] == [2]


def test_pictures_are_drawn() -> None:
    nothing = np.zeros((1, 8, 8), dtype=int)
    empty = CaseImages(nothing.astype(np.float32), (1.0, 1.0, 1.0), nothing, {"MaskSAM": nothing}, "MaskSAM")
    for png in (draw_case(made_up_case(), CLASSES), draw_case(empty, CLASSES)):
        assert png.startswith(b"\x89PNG") and len(png) > 2000


def test_photographs_keep_their_colours() -> None:
    red = np.zeros((3, 1, 40, 50), np.float32)
    red[0, 0, :, 25:] = 255
    assert colours_or_grey(red, ".nii.gz").shape == (1, 40, 50)
    nothing = np.zeros((1, 40, 50), dtype=int)
    images = CaseImages(colours_or_grey(red, ".png"), (1.0, 1.0, 1.0), nothing, {"MaskSAM": nothing}, "MaskSAM")
    pixels = imread(io.BytesIO(draw_case(images, CLASSES)))[..., :3]
    assert (np.abs(pixels - (1, 0, 0)).max(-1) < 0.05).sum() > 1000


def test_surroundings_have_a_margin_inside_the_plane() -> None:
    found = np.zeros((60, 50), dtype=bool)
    assert surroundings(found) == (slice(0, 60), slice(0, 50))
    found[30, 5] = True
    assert surroundings(found) == (slice(18, 43), slice(0, 18))


def test_numbers() -> None:
    assert [number(3)(0.12345), number(0)(1234567), number(1)(math.nan)] == ["0.123", "1\u2009234\u2009567", "–"]
    signed = number(3, signed=True)
    assert [signed(x) for x in (0.0123, -0.0123, -0.0001, math.nan)] == ["+0.012", "−0.012", "0.000", "–"]


def test_names_break_where_people_would() -> None:
    assert wrapped("MaskSAMTrainer_tiny_budget cost $5", 15) == "MaskSAMTrainer_\ntiny_budget\ncost \\$5"
    assert wrapped("a" * 50, 10, lines=2) == "a" * 10 + "\n" + "a" * 9 + "…"
    assert breakable("<b>_c") == "&lt;b&gt;_<wbr>c"
    parts = ["nnUNetTrainer ", "(nnUNet", "Res", "Enc", "UNet", "LPlans)"]
    assert pieces("nnUNetTrainer (nnUNetResEncUNetLPlans)", 24) == parts


def test_json_is_strict(tmp_path: Path) -> None:
    content = plain({1: np.float32(0.5), "path": tmp_path, "set": {"b", "a"}, "array": np.array([math.nan, 1.0])})
    assert content == {"1": 0.5, "path": str(tmp_path), "set": ["a", "b"], "array": [None, 1.0]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", math.nan)
    assert not (tmp_path / "bad.json").exists()
