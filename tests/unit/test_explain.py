"""The parts of ``masksam explain``: slices, uncertainty, cases, overlays, the output folder, queries, pictures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from configs import PAPER, tiny_config
from kinds_of_data import OBLIQUE
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.inference.explain import figures
from masksam_nnunet.inference.explain.case import find_case, seen_in_training
from masksam_nnunet.inference.explain.figures import SliceImages, draw_overview, draw_queries
from masksam_nnunet.inference.explain.inside import SliceQueries, nearest_window, owners
from masksam_nnunet.inference.explain.measures import SHOWN, measure_uncertainty, query_table, spread_slices
from masksam_nnunet.inference.explain.output import RECORD, affine_of, fresh_folder, write_tables, write_volume
from masksam_nnunet.inference.explain.run import read_slices
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.modeling.network import MaskSAMOutput

CLASSES = Classes({"liver": (1,), "kidney $x$": (2,)}, has_regions=False, ignore_label=None)
DESCRIPTION = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_chosen_slices_are_the_richest_and_spread() -> None:
    foreground = np.array([0, 0, 5, 6, 9, 5, 9, 6, 5, 5, 0, 0])
    entropy = np.zeros(12)
    entropy[[2, 9]] = 1.0
    assert spread_slices(foreground, entropy, 4) == [2, 4, 6, 9]
    assert spread_slices(np.zeros(5, int), np.array([0, 0, 3.0, 0, 0]), 1) == [2]
    assert spread_slices(np.zeros(3, int), np.zeros(3), 9) == [0, 1, 2]
    assert spread_slices(np.array([0, 7, 0]), np.zeros(3), 4) == [1]


def test_words_of_the_slices_option() -> None:
    assert read_slices([]) is None is read_slices(["auto"]) and read_slices(["20", "3", "20"]) == [3, 20]
    for words in (["4", "-1"], ["auto", "4"], [str(n) for n in range(25)]):
        with pytest.raises(UsageError, match="--slices"):
            read_slices(words)


# ---- uncertainty -----------------------------------------------------------------------------------------------------


def volume_of(*probabilities: float) -> torch.Tensor:
    """Logits (K, 1, 1, 1) of these probabilities."""
    return torch.tensor(probabilities).log().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("folds", "regions", "entropy", "disagreement"),
    [
        ([volume_of(0.5, 0.5, 1e-9)], False, 1.0, None),
        ([volume_of(0.7, 0.2, 0.1)], False, -sum(x * math.log2(x) for x in (0.7, 0.2, 0.1)), None),
        ([volume_of(1.0, 1e-9), volume_of(1e-9, 1.0)], False, 1.0, 1.0),  # sure of different things
        ([volume_of(0.5, 0.5)] * 3, False, 1.0, 0.0),
        ([torch.tensor([8.0, 0.0, -1.0]).reshape(3, 1, 1, 1)], True, 1.0, None),  # of the least certain region
    ],
)
def test_uncertainty_by_hand(
    folds: list[torch.Tensor], regions: bool, entropy: float, disagreement: float | None
) -> None:
    found = measure_uncertainty(folds, regions)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-4)
    assert (found.disagreement is None) == (disagreement is None)
    if found.disagreement is not None:
        assert found.disagreement.item() == pytest.approx(disagreement, abs=1e-4)


def test_disagreement_is_a_part_of_the_entropy_and_logits_are_the_mean() -> None:
    folds = [torch.randn(4, 3, 5, 6).mul(3).half() for _ in range(3)]
    for regions in (False, True):
        measured = measure_uncertainty(iter(folds), regions)
        assert measured.disagreement is not None
        assert (measured.disagreement >= 0).all() and (measured.disagreement <= measured.entropy + 1e-5).all()
        torch.testing.assert_close(measured.logits, (folds[0] + folds[1] + folds[2]) / 3, rtol=0, atol=0)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Dataset001_X"
    for part, name in (("imagesTr", "liver_01"), ("imagesTr", "liver_02"), ("imagesTs", "spleen_a.b")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for channel in (1, 0):
            (folder / part / f"{name}_{channel:04d}.nii.gz").touch()
    (folder / "labelsTr").mkdir()
    (folder / "labelsTr" / "liver_01.nii.gz").touch()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    return folder


def test_cases_are_found_with_their_labels(raw: Path) -> None:
    found = find_case(raw.name, DESCRIPTION, "liver_01", [], None)
    assert [file.name for file in found.case.files] == ["liver_01_0000.nii.gz", "liver_01_0001.nii.gz"]
    assert found.label == raw / "labelsTr" / "liver_01.nii.gz" and found.origin == "imagesTr of Dataset001_X"
    test = find_case(raw.name, DESCRIPTION, "spleen_a.b", [], None)
    assert test.label is None and test.origin == "imagesTs of Dataset001_X"
    assert find_case(raw.name, DESCRIPTION, "liver_02", [], found.label).label == found.label
    given = find_case(raw.name, DESCRIPTION, None, [found.case.files[0]], None)
    assert (given.case.name, given.label) == ("liver_01", None)
    entry = {"label": "labelsTr/liver_01.nii.gz", "images": ["i.nii.gz"]}
    (raw / "dataset.json").write_text(json.dumps({"dataset": {"far": entry}}))
    far = find_case(raw.name, DESCRIPTION, "far", [], None)
    assert far.label == found.label and far.case.files == (raw / "i.nii.gz",)


@pytest.mark.parametrize(
    ("case", "images", "named"),
    [
        ("liver_1", (), "'liver_1'.*: liver_01"),
        ("zzz", (), "'zzz'.*liver_01, liver_02, spleen_a.b"),
        (None, (), "CASE"),
        ("x", ("nowhere.nii.gz",), "--image nowhere.nii.gz"),
        ("a/b", (__file__,), "'a/b'"),
        ("x", (__file__, __file__), "--image.*MRI"),
        ("x", (), "--label nowhere.nii.gz"),
    ],
)
def test_cases_that_do_not_exist_are_named(raw: Path, case: str | None, images: tuple[str, ...], named: str) -> None:
    label = Path("nowhere.nii.gz") if "--label" in named else None
    with pytest.raises(UsageError, match=named):
        find_case(raw.name, DESCRIPTION, case, [Path(file) for file in images], label)


def test_the_page_says_whether_the_network_has_seen_the_case(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen_in_training(raw.name, "liver_01", ["0"]) is None
    splits = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (raw / "splits_final.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_preprocessed", str(raw.parent))
    assert seen_in_training(raw.name, "b", ["0"]) == "outside the training set of fold 0"
    said = "in the training set of fold 0 and outside the training set of fold 1 and in the training set of fold all"
    assert seen_in_training(raw.name, "a", ["0", "1", "all"]) == said
    assert seen_in_training(raw.name, "c", ["all"]) == "outside the training set of fold all"
    beyond = seen_in_training(raw.name, "a", ["0", "2"])
    assert beyond is not None and beyond.startswith("perhaps") and "fold 2" in beyond
    (raw / "splits_final.json").write_text("[{")
    with pytest.raises(DataError, match=r"splits_final\.json"):
        seen_in_training(raw.name, "a", ["0"])


# ---- overlays --------------------------------------------------------------------------------------------------------


def write_source(file: Path, dimensions: int = 3) -> sitk.Image:
    size = (5, 7, 4, 2)[:dimensions]
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=size[::-1]).astype(np.float32), isVector=False)
    image.SetSpacing((0.7, 0.9, 3.3, 1.0)[:dimensions])
    image.SetOrigin((-17.5, 3.25, 120.0, 0.0)[:dimensions])
    direction = np.eye(dimensions)
    if dimensions > 2:
        direction[:3, :3] = np.reshape(OBLIQUE, (3, 3))[:, [2, 0, 1]] * [1, -1, 1]
    image.SetDirection(direction.flatten())
    sitk.WriteImage(image, str(file))
    return image


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (SimpleITKIO, np.uint8),
        (SimpleITKIOWithReorient, np.uint16),
        (NibabelIO, np.float32),
        (NibabelIOWithReorient, np.uint8),
    ],
)
def test_overlays_lie_on_the_voxels_of_the_source(reader: Any, kind: Any, tmp_path: Path) -> None:
    source = tmp_path / "source.nii.gz"
    image = write_source(source)
    array, properties = reader().read_images([str(source)])
    # What is written is the image itself, as it was read: it must come out where it was.
    values = np.rint(array[0] * 20 + 100).astype(kind)
    write_volume(tmp_path / "overlay.nii.gz", values, properties)
    overlay = sitk.ReadImage(str(tmp_path / "overlay.nii.gz"))
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(overlay, geometry)(), getattr(image, geometry)(), atol=2e-5)
    wanted = np.rint(sitk.GetArrayFromImage(image) * 20 + 100).astype(kind)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(overlay), wanted)
    one, other = (nibabel.load(tmp_path / name) for name in ("source.nii.gz", "overlay.nii.gz"))
    assert other.get_data_dtype() == np.dtype(kind)
    np.testing.assert_allclose(one.affine, other.affine, atol=2e-5)


def test_overlays_of_pictures_and_of_files_that_hold_all_channels(tmp_path: Path) -> None:
    write_source(tmp_path / "flat.nii.gz", dimensions=2)
    array, properties = SimpleITKIO().read_images([str(tmp_path / "flat.nii.gz")])
    write_volume(tmp_path / "overlay.nii.gz", array[0].astype(np.uint8), properties)
    overlay = sitk.ReadImage(str(tmp_path / "overlay.nii.gz"))
    assert overlay.GetSize() == (5, 7, 1) and overlay.GetSpacing() == pytest.approx((0.7, 0.9, 1))
    assert affine_of(properties) is None
    image = write_source(tmp_path / "channels.nii.gz", dimensions=4)
    array, properties = SimpleITKIO().read_images([str(tmp_path / "channels.nii.gz")])
    assert len(array) == 2
    write_volume(tmp_path / "overlay.nii.gz", array[1].astype(np.float32), properties)
    overlay = sitk.ReadImage(str(tmp_path / "overlay.nii.gz"))
    assert overlay.GetSize() == image.GetSize()[:3] and overlay.GetSpacing() == pytest.approx(image.GetSpacing()[:3])
    np.testing.assert_allclose(
        np.reshape(overlay.GetDirection(), (3, 3)), np.reshape(image.GetDirection(), (4, 4))[:3, :3], atol=1e-5
    )
    write_volume(tmp_path / "plain.nii.gz", np.ones((1, 4, 6), np.uint8), {"spacing": (999, 1, 1)})
    assert sitk.ReadImage(str(tmp_path / "plain.nii.gz")).GetSize() == (6, 4, 1)
    write_volume(tmp_path / "tiff.nii.gz", np.ones((3, 4, 6), np.uint8), {"spacing": [4.0, 0.5, 0.25]})
    assert sitk.ReadImage(str(tmp_path / "tiff.nii.gz")).GetSpacing() == (0.25, 0.5, 4.0)


def test_tables_of_names_and_colours(tmp_path: Path) -> None:
    write_tables(tmp_path / "x", {1: 'the "left" one', 300: "b"}, {1: "#ff8000", 300: "#000001"})
    rows = [line for line in (tmp_path / "x.label").read_text().splitlines() if not line.startswith("#")]
    assert [(*row.split('"')[0].split(), row.split('"')[1]) for row in rows] == [
        ("0", "0", "0", "0", "0", "0", "0", "Clear Label"),
        ("1", "255", "128", "0", "1", "1", "1", "the 'left' one"),
        ("300", "0", "0", "1", "1", "1", "1", "b"),
    ]
    rows = [line for line in (tmp_path / "x.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert rows == ["0 background 0 0 0 0", '1 the_"left"_one 255 128 0 255', "300 b 0 0 1 255"]


# ---- output folder ---------------------------------------------------------------------------------------------------


def write_ours(out: Path, text: str) -> None:
    with fresh_folder(out) as folder:
        (folder / "page.html").write_text(text)
        (folder / RECORD).write_text(json.dumps({"made_by": "masksam explain", "files": ["page.html"]}))


def test_an_earlier_output_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    write_ours(out, "one")
    write_ours(out, "two")
    assert (out / "page.html").read_text() == "two" and list(out.parent.iterdir()) == [out]
    with pytest.raises(ZeroDivisionError), fresh_folder(out) as folder:
        (folder / "page.html").write_text("three")
        raise ZeroDivisionError
    assert (out / "page.html").read_text() == "two" and list(out.parent.iterdir()) == [out]
    (out / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"notes\.txt"), fresh_folder(out):
        pass
    assert (out / "notes.txt").is_file() and (out / "page.html").read_text() == "two"


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "out"):
        with pytest.raises(UsageError, match=f"--out {out}"), fresh_folder(out):
            pass
    with pytest.raises(UsageError, match="No space left"), fresh_folder(tmp_path / "x") as folder:
        raise OSError(28, "No space left on device", str(folder / "page.html"))
    assert list(tmp_path.iterdir()) == [file]


# ---- queries ---------------------------------------------------------------------------------------------------------


def test_the_nearest_window_holds_the_slice() -> None:
    corners = [(0, 0, 0), (0, 0, 8), (4, 0, 0), (4, 0, 8)]
    size, spacing = (8, 16, 16), (1.0, 1.0, 1.0)
    assert nearest_window(corners, size, (1, 8, 8), spacing) == 0
    assert nearest_window(corners, size, (5, 8, 16), spacing) == 1  # centres at 3.5 and 7.5
    assert nearest_window(corners, size, (7, 8, 16), spacing) == 3
    assert nearest_window(corners, size, (0, 8, 30), (100.0, 1.0, 1.0)) == 1


def test_who_gives_a_voxel_its_class() -> None:
    classes = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.1, 0.6, 0.2, 0.1], [0.05, 0.0, 0.9, 0.05]])
    masks = torch.tensor([[0.9, 0.1, 0.1, 0.01], [0.5, 0.9, 0.1, 0.01], [0.1, 0.1, 0.95, 0.01]])  # (N, voxels)
    parts = MaskSAMOutput(
        classes.log()[None, None], masks.logit().reshape(1, 1, 3, 1, 4), torch.empty(0), torch.empty(0)
    )
    # 0.72 against 0.3; 0.08 against 0.54; the third query's class; nothing covers the last.
    assert owners(parts, tiny_config(**PAPER)).flatten().tolist() == [1, 2, 3, 0]
    # Here the first of the four heads is a region too: it is never above one half.
    assert owners(parts, tiny_config(**PAPER, regions=True)).flatten().tolist() == [1, 2, 3, 0]


def made_up_queries() -> SliceQueries:
    """A window of 4 x 32 x 32; the first query is a kidney, the second a liver, the third background."""
    count = 24
    probabilities = np.full((count, 4), 0.01, np.float32)
    probabilities[:, 3] = 0.97  # no object
    for query, head in enumerate((2, 1, 0)):
        probabilities[query] = 0.02
        probabilities[query, head] = 0.94
    masks = np.zeros((count, 32, 32), np.float32)
    masks[0, 4:12, 8:24] = 1
    masks[1, 16:20, 8:16] = 1
    masks[2] = 1
    drafts = np.zeros_like(masks)
    drafts[0, 4:12, 8:16] = 1
    boxes = np.tile(np.array([8, 4, 24, 12], np.float32), (count, 1))
    return SliceQueries(
        5, (2, 6), (-1, 2, -3), (4, 32, 32), probabilities, boxes, drafts, masks, (slice(0, 30), slice(3, 32))
    )


def made_up_images() -> SliceImages:
    shape = (40, 50)
    result = np.zeros(shape, np.int16)
    result[6:14, 5:21] = 2
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return SliceImages(image, result.copy(), result, 1.5, (-2.0, 2.0))


def by_number(table: pd.DataFrame) -> list[Any]:
    return list(table.sort_values("number").itertuples())


def test_the_table_of_queries_by_hand() -> None:
    images = made_up_images()
    assert images.label is not None
    table = query_table(made_up_queries(), images.label, CLASSES)
    assert table.number.tolist()[:3] == [1, 3, 2]  # by share
    assert table.shown.sum() == SHOWN == 12 and table.contributes.sum() == 3
    first, second, background, *others = by_number(table)
    assert (first.class_name, first.kept, first.contributes) == ("kidney $x$", True, True)
    assert first.box == [5.0, 6.0, 21.0, 14.0]  # in the volume
    assert (first.draft_pixels, first.mask_pixels, first.draft_iou, first.label_iou) == (64, 128, 0.5, 1.0)
    assert (second.class_name, second.label_iou, second.draft_iou) == ("liver", 0.0, 0.0)
    assert background.class_name == "background" and background.mask_pixels == 30 * 29
    assert background.label_iou == pytest.approx(1 - 128 / (30 * 29))
    assert not others[-1].kept and others[-1].no_object == pytest.approx(0.97, abs=1e-6)
    assert math.isnan(others[-1].draft_iou) and others[-1].label_iou == 0
    # Shares: (0.94 + 0.02)·128, 0.96·32, (0.02 + 0.02)·870.
    scores = np.array([0.96 * 128, 0.96 * 32, 0.04 * 870])
    assert table.share[:3].tolist() == pytest.approx(sorted(scores / scores.sum())[::-1], abs=1e-4)
    assert table.share.sum() == pytest.approx(1)
    assert query_table(made_up_queries(), None, CLASSES).label_iou.isna().all()
    images.label[6:14, 13:21] = 3  # ignored
    ignoring = query_table(made_up_queries(), images.label, Classes(CLASSES.foreground, False, ignore_label=3))
    assert by_number(ignoring)[0].label_iou == 1.0


def test_pictures_hold_what_the_table_says_and_no_more_than_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    png = figures.png
    monkeypatch.setattr(figures, "png", lambda figure: (drawn.append(figure), png(figure))[1])
    queries, images = made_up_queries(), made_up_images()
    table = query_table(queries, images.label, CLASSES)
    picture, caption = draw_queries(images, queries, table, CLASSES)
    assert picture.startswith(b"\x89PNG") and caption.startswith("12 of 24 queries")
    panels = [ax for ax in drawn[0].axes if ax.get_visible()]
    titled = [ax for ax in panels if ax.get_title()]
    assert len(panels) == 24 and len(titled) == 12
    rows, columns = (int(number) for number in re.findall(r"(?:rows|columns) (\d+) to", caption))
    for ax, query in zip(titled, table.itertuples(), strict=False):
        (edges,) = ax.patches
        x0, y0 = edges.get_x() + 0.5 + columns, edges.get_y() + 0.5 + rows
        assert [x0, y0, x0 + edges.get_width(), y0 + edges.get_height()] == query.box
        assert f"{query.number}" in ax.get_title() and f"{query.probability:.2f}" in ax.get_title()
    assert "kidney" in titled[0].get_title() and r"\$x\$" in titled[0].get_title()
    classes = Classes(CLASSES.foreground, False, ignore_label=3)
    maps = dict.fromkeys(("entropy", "disagreement"), np.ones((40, 50), np.float32))
    assert draw_overview(images, queries, classes, maps, "AR").startswith(b"\x89PNG")
    assert [ax.get_title() for ax in drawn[1].axes[:5]] == ["image", "label", "result", "entropy", "disagreement"]
    letters = {text.get_text(): text.xy for text in drawn[1].axes[0].texts}
    assert letters == {"A": (0.5, 0), "P": (0.5, 1), "R": (1, 0.5), "L": (0, 0.5)}
    assert len(drawn[1].axes[0].patches) == 1  # the window's frame
