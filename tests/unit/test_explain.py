"""The parts of ``masksam explain``: slices, uncertainty, cases, overlays, the output folder, pictures."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from kinds_of_data import OBLIQUE
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from masksam_nnunet.errors import ExplainError
from masksam_nnunet.inference.explain import figures
from masksam_nnunet.inference.explain.case import find_case, fold_of
from masksam_nnunet.inference.explain.facts import SHOWN, slice_facts
from masksam_nnunet.inference.explain.figures import SliceImages, draw_overview, draw_queries, queries_view
from masksam_nnunet.inference.explain.folder import RECORD, fresh_folder
from masksam_nnunet.inference.explain.overlays import affine_of, write_colour_table, write_label_table, write_volume
from masksam_nnunet.inference.explain.run import caption_of
from masksam_nnunet.inference.explain.slices import choose_slices, read_slices
from masksam_nnunet.inference.explain.uncertainty import measure
from masksam_nnunet.inference.explain.volume import picture_edges
from masksam_nnunet.inference.explain.windows import SliceQueries, nearest_window, owners
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.modeling.network import MaskSAMOutput

CLASSES = Classes({"liver": (1,), "kidney $x$": (2,)}, has_regions=False, ignore_label=None)
DESCRIPTION = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_chosen_slices_are_the_richest_and_spread() -> None:
    foreground = np.array([0, 0, 5, 6, 9, 5, 9, 6, 5, 5, 0, 0])
    entropy = np.zeros(12)
    entropy[[2, 9]] = 1.0
    chosen = choose_slices(foreground, entropy, 4)
    assert chosen[0] == 2 and chosen[-1] == 9 and 4 in chosen
    assert len(chosen) == 4 and all(b - a >= 2 for a, b in pairwise(chosen))
    assert choose_slices(np.zeros(5, int), np.array([0, 0, 3.0, 0, 0]), 1) == [2]
    assert choose_slices(np.zeros(3, int), np.zeros(3), 9) == [0, 1, 2]
    assert choose_slices(np.array([0, 7, 0]), np.zeros(3), 4) == [1]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_slices_can_be_chosen_from(count: int) -> None:
    rng = np.random.default_rng(count)
    for size in range(1, 30):
        foreground = rng.integers(0, 2, size) * rng.integers(0, 50, size)
        chosen = choose_slices(foreground, rng.random(size), count)
        assert chosen == sorted(set(chosen)) and 1 <= len(chosen) <= count
        assert not foreground.any() or all(foreground[chosen] > 0)


def test_words_of_the_slices_option() -> None:
    assert read_slices([]) is None and read_slices(["auto"]) is None
    assert read_slices(["20", "3", "20"]) == [3, 20]
    with pytest.raises(ExplainError, match="'-1' is no slice"):
        read_slices(["4", "-1"])
    with pytest.raises(ExplainError, match="25 slices; a page shows at most 24"):
        read_slices([str(n) for n in range(25)])


# ---- uncertainty -----------------------------------------------------------------------------------------------------


def volume_of(*probabilities: float) -> torch.Tensor:
    """Logits (K, 1, 1, 1) of these probabilities."""
    return torch.tensor(probabilities).log().reshape(-1, 1, 1, 1)


def test_entropy_by_hand() -> None:
    even = measure([volume_of(0.5, 0.5, 1e-9)], regions=False)
    assert even.disagreement is None and even.entropy.item() == pytest.approx(1.0, abs=1e-3)
    p = (0.7, 0.2, 0.1)
    expected = -sum(x * math.log2(x) for x in p)
    assert measure([volume_of(*p)], regions=False).entropy.item() == pytest.approx(expected, abs=1e-5)


def test_folds_that_are_sure_of_different_things_disagree_and_equal_ones_do_not() -> None:
    sure = [volume_of(1.0, 1e-9), volume_of(1e-9, 1.0)]
    apart = measure(sure, regions=False)
    assert apart.disagreement is not None
    assert apart.entropy.item() == pytest.approx(1.0, abs=1e-4)
    assert apart.disagreement.item() == pytest.approx(1.0, abs=1e-4)
    unsure = measure([volume_of(0.5, 0.5)] * 3, regions=False)
    assert unsure.disagreement is not None
    assert unsure.entropy.item() == pytest.approx(1.0, abs=1e-4)
    assert unsure.disagreement.item() == pytest.approx(0.0, abs=1e-5)


def test_disagreement_is_a_part_of_the_entropy_and_logits_are_the_mean() -> None:
    folds = [torch.randn(4, 3, 5, 6).mul(3).half() for _ in range(3)]
    for regions in (False, True):
        measured = measure(iter(folds), regions)
        assert measured.disagreement is not None
        assert (measured.disagreement >= 0).all() and (measured.disagreement <= measured.entropy + 1e-5).all()
        assert measured.entropy.max() <= (1 if regions else 2) + 1e-5
        torch.testing.assert_close(measured.logits, (folds[0] + folds[1] + folds[2]) / 3, rtol=0, atol=0)


def test_a_voxel_is_as_uncertain_as_its_least_certain_region() -> None:
    logits = torch.tensor([8.0, 0.0, -1.0]).reshape(3, 1, 1, 1)
    assert measure([logits], regions=True).entropy.item() == pytest.approx(1.0, abs=1e-6)


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


def test_cases_of_both_folders_are_found_with_their_labels(raw: Path) -> None:
    found = find_case(raw.name, DESCRIPTION, "liver_01", [], None)
    assert [file.name for file in found.images] == ["liver_01_0000.nii.gz", "liver_01_0001.nii.gz"]
    assert found.label == raw / "labelsTr" / "liver_01.nii.gz" and found.origin == "imagesTr of Dataset001_X"
    test = find_case(raw.name, DESCRIPTION, "spleen_a.b", [], None)
    assert test.label is None and test.origin == "imagesTs of Dataset001_X"
    assert find_case(raw.name, DESCRIPTION, "liver_02", [], found.label).label == found.label
    (raw / "dataset.json").write_text(json.dumps({"dataset": {"far": {"label": "l.nii.gz", "images": ["i.nii.gz"]}}}))
    with pytest.raises(ExplainError, match=r"--label .*l.nii.gz: there is no such file"):
        find_case(raw.name, DESCRIPTION, "far", [], None)


@pytest.mark.parametrize(
    ("case", "images", "said"),
    [
        ("liver_1", (), r"'liver_1' is none of the 3 cases .* near it: liver_01"),
        ("zzz", (), r"near it: liver_01, liver_02, spleen_a.b"),
        (None, (), "no case: name one"),
        ("x", ("nowhere.nii.gz",), "--image nowhere.nii.gz: there is no such file"),
        ("a/b", (__file__,), "give a plain name"),
        ("x", (__file__, __file__), r"2 files, but the model was trained on 1 channels \(MRI\)"),
    ],
)
def test_cases_that_are_not_there(raw: Path, case: str | None, images: tuple[str, ...], said: str) -> None:
    with pytest.raises(ExplainError, match=said):
        find_case(raw.name, DESCRIPTION, case, [Path(file) for file in images], None)


def test_given_files_are_named_after_themselves(tmp_path: Path) -> None:
    file = tmp_path / "some.one_0000.nii.gz"
    file.touch()
    assert find_case("Dataset001_X", DESCRIPTION, None, [file], None).name == "some.one"


def test_the_page_tells_whether_the_network_has_seen_the_case(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fold_of(raw.name, "liver_01", ["0"]) is None
    splits = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (raw / "splits_final.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_preprocessed", str(raw.parent))
    assert fold_of(raw.name, "b", ["0"]) == "a validation case of fold 0: not seen in training"
    assert "in the training set of fold 0; the network has seen it" in str(fold_of(raw.name, "a", ["0"]))
    assert fold_of(raw.name, "a", ["0", "1"]) == "in the training set of fold 0, not of fold 1"
    assert "training set of fold all" in str(fold_of(raw.name, "a", ["all"]))
    assert fold_of(raw.name, "test case", ["0"]) == "in no part of the split: not seen in training"


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


READERS = [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
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
    assert one.shape == other.shape and other.get_data_dtype() == np.dtype(kind)
    np.testing.assert_allclose(one.affine, other.affine, atol=2e-5)


def test_overlays_of_pictures_and_of_files_that_hold_all_channels(tmp_path: Path) -> None:
    write_source(tmp_path / "flat.nii.gz", dimensions=2)
    array, properties = SimpleITKIO().read_images([str(tmp_path / "flat.nii.gz")])
    write_volume(tmp_path / "overlay.nii.gz", array[0].astype(np.uint8), properties)
    assert sitk.ReadImage(str(tmp_path / "overlay.nii.gz")).GetSize() == (5, 7)
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


@pytest.mark.parametrize("reader", READERS)
def test_affines_agree_with_nibabels(reader: Any, tmp_path: Path) -> None:
    write_source(tmp_path / "source.nii.gz")
    source = nibabel.load(tmp_path / "source.nii.gz")
    wanted = source.affine
    if "Reorient" in reader.__name__:
        wanted = source.as_reoriented(nibabel.io_orientation(wanted)).affine
    affine = affine_of(reader().read_images([str(tmp_path / "source.nii.gz")])[1])
    np.testing.assert_allclose(affine, wanted, atol=2e-5)


def test_edges_of_pictures() -> None:
    assert picture_edges(("A", "R")) == {"top": "P", "bottom": "A", "left": "L", "right": "R"}


def test_tables_of_names_and_colours(tmp_path: Path) -> None:
    names, colours = {1: 'the "left" one', 300: "b"}, {1: "#ff8000", 300: "#000001"}
    write_label_table(tmp_path / "x.label", names, colours)
    rows = [line for line in (tmp_path / "x.label").read_text().splitlines() if not line.startswith("#")]
    fields = [(*row.split('"')[0].split(), row.split('"')[1]) for row in rows]
    assert fields[0] == ("0", "0", "0", "0", "0", "0", "0", "Clear Label")
    assert fields[1] == ("1", "255", "128", "0", "1", "1", "1", "the 'left' one")
    assert fields[2] == ("300", "0", "0", "1", "1", "1", "1", "b")
    write_colour_table(tmp_path / "x.ctbl", names, colours)
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
    with pytest.raises(ExplainError, match=r"holds notes.txt, no output of masksam explain"), fresh_folder(out):
        pass
    assert (out / "notes.txt").is_file() and (out / "page.html").read_text() == "two"


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ExplainError, match="is a file; name a folder"), fresh_folder(file):
        pass
    with (
        pytest.raises(ExplainError, match=r"cannot be written: (Not a directory|File exists)"),
        fresh_folder(file / "out"),
    ):
        pass
    with pytest.raises(ExplainError, match="cannot be written: No space left"), fresh_folder(tmp_path / "x") as folder:
        raise OSError(28, "No space left on device", str(folder / "page.html"))
    assert list(tmp_path.iterdir()) == [file]


# ---- queries ---------------------------------------------------------------------------------------------------------


def test_the_nearest_window_holds_the_slice() -> None:
    corners = [(0, 0, 0), (0, 0, 8), (4, 0, 0), (4, 0, 8)]
    size, spacing = (8, 16, 16), (1.0, 1.0, 1.0)
    assert nearest_window(corners, size, (1, 8, 8), spacing) == 0
    assert nearest_window(corners, size, (9, 8, 8), spacing) == 2
    assert nearest_window(corners, size, (5, 8, 16), spacing) == 1  # centres at 3.5 and 7.5
    assert nearest_window(corners, size, (7, 8, 16), spacing) == 3
    assert nearest_window(corners, size, (0, 8, 30), (100.0, 1.0, 1.0)) == 1
    assert nearest_window([(0, 0, 0), (1, 0, 0)], (1, 16, 16), (1, 0, 0), spacing) == 1


def test_who_gives_a_voxel_its_class() -> None:
    classes = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.1, 0.6, 0.2, 0.1], [0.05, 0.0, 0.9, 0.05]])
    masks = torch.tensor([[0.9, 0.1, 0.1, 0.01], [0.5, 0.9, 0.1, 0.01], [0.1, 0.1, 0.95, 0.01]])  # (N, voxels)
    parts = MaskSAMOutput(
        classes.log()[None, None], masks.logit().reshape(1, 1, 3, 1, 4), torch.empty(0), torch.empty(0)
    )
    # 0.72 against 0.3; 0.08 against 0.54; the third query's class; nothing covers the last.
    assert owners(parts, regions=False).flatten().tolist() == [1, 2, 3, 0]
    # Here the first of the four heads is a region too: it is never above one half.
    assert owners(parts, regions=True).flatten().tolist() == [1, 2, 3, 0]


def made_up_queries(count: int = 24, corner: tuple[int, int, int] = (-1, 2, -3)) -> SliceQueries:
    """A window of 4 x 32 x 32; the first query is a kidney, the second a liver, the third background."""
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
    return SliceQueries(5, 2, 6, corner, (4, 32, 32), probabilities, boxes, drafts, masks, (slice(0, 30), slice(3, 32)))


def made_up_images(shape: tuple[int, int] = (40, 50)) -> SliceImages:
    rng = np.random.default_rng(0)
    result = np.zeros(shape, np.int16)
    result[6:14, 5:21] = 2
    bits = rng.random(shape, dtype=np.float32)
    image = rng.normal(size=shape).astype(np.float32)
    return SliceImages(image, result.copy(), result, bits, bits / 2, 1.5, (-2.0, 2.0), ("A", "R"))


def test_facts_by_hand() -> None:
    queries, images = made_up_queries(), made_up_images()
    facts = slice_facts(7, queries, images.label, images.result, images.entropy, CLASSES)
    assert (facts.source, facts.network, facts.window, facts.foreground) == (7, 5, (2, 6), 128)
    assert facts.off_centre == 4.5  # the window is slices -1 to 2
    by_number = sorted(facts.queries, key=lambda query: query.number)
    first, second, background, *others = by_number
    assert [query.number for query in facts.queries[:3]] == [1, 3, 2]  # by share
    assert (first.number, first.class_name, first.kept, first.contributes) == (1, "kidney $x$", True, True)
    assert first.box == (5.0, 6.0, 21.0, 14.0)  # in the volume
    assert (first.draft_pixels, first.mask_pixels, first.draft_iou) == (64, 128, 0.5)
    assert first.label_iou == 1.0
    assert (second.class_name, second.label_iou, second.draft_iou) == ("liver", 0.0, 0.0)
    assert background.class_name == "background" and background.mask_pixels == 30 * 29
    assert background.label_iou == pytest.approx(1 - 128 / (30 * 29))
    assert not others[-1].kept and others[-1].no_object == pytest.approx(0.97, abs=1e-6)
    assert math.isnan(others[-1].draft_iou) and others[-1].label_iou == 0
    # Shares: (0.94 + 0.02)·128, 0.96·32, (0.02 + 0.02)·870.
    scores = np.array([0.96 * 128, 0.96 * 32, 0.04 * 870])
    assert [query.share for query in by_number[:3]] == pytest.approx(scores / scores.sum(), abs=1e-4)
    assert sum(query.share for query in facts.queries) == pytest.approx(1)
    no_label = slice_facts(7, queries, None, images.result, images.entropy, CLASSES)
    assert all(math.isnan(query.label_iou) for query in no_label.queries)


def test_ignored_voxels_do_not_count() -> None:
    images = made_up_images()
    assert images.label is not None
    images.label[6:14, 13:21] = 3
    classes = Classes(CLASSES.foreground, False, ignore_label=3)
    facts = slice_facts(7, made_up_queries(), images.label, images.result, images.entropy, classes)
    assert facts.queries[0].label_iou == 1.0
    assert draw_overview(images, made_up_queries(), classes).startswith(b"\x89PNG")


def test_pictures_hold_what_the_facts_say_and_no_more_than_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    png = figures.png
    monkeypatch.setattr(figures, "png", lambda figure: (drawn.append(figure), png(figure))[1])
    queries, images = made_up_queries(), made_up_images()
    facts = slice_facts(7, queries, images.label, images.result, images.entropy, CLASSES)
    assert facts.shown == SHOWN == 12 and facts.contributing == 3
    view = queries_view(images, queries, facts)
    assert caption_of(facts, view, images.image.shape).startswith("12 of 24 queries shown")
    assert draw_queries(images, queries, facts, CLASSES).startswith(b"\x89PNG")
    panels = [ax for ax in drawn[0].axes if ax.get_visible()]
    titled = [ax for ax in panels if ax.get_title()]
    assert len(panels) == 24 and len(titled) == 12
    for ax, query in zip(titled, facts.queries, strict=False):
        title = ax.get_title()
        assert title.startswith(f"query {query.number}: ") and f"adds {100 * query.share:.0f} %" in title
        assert f"{query.no_object:.2f}" in title and f"{query.probability:.2f}" in title
        (edges,) = ax.patches
        x0, y0 = edges.get_x() + 0.5 + view[1].start, edges.get_y() + 0.5 + view[0].start
        assert (x0, y0, x0 + edges.get_width(), y0 + edges.get_height()) == (8, 4, 24, 12)
    assert "kidney" in titled[0].get_title() and r"\$x\$" in titled[0].get_title()
    png_of_overview = draw_overview(images, queries, CLASSES)
    titles = [ax.get_title() for ax in drawn[1].axes]
    assert titles[:5] == ["image", "label", "result", "uncertainty (entropy)", "disagreement of folds"]
    letters = [text.get_text() for text in drawn[1].axes[0].texts]
    assert letters == ["P", "A", "L", "R"]
    assert len(drawn[1].axes[0].patches) == 1  # the window's frame
    assert png_of_overview.startswith(b"\x89PNG")


def test_large_pictures_stay_readable_files(tmp_path: Path) -> None:
    """One query, no label, a plane of 3 x 200: nothing that depends on sizes breaks."""
    queries = SliceQueries(
        0, 1, 1, (0, 0, 0), (1, 3, 200), np.array([[0.0, 0.0, 0.0, 1.0]], np.float32),
        np.array([[0, 0, 200, 3]], np.float32), *(np.zeros((1, 3, 200), np.float32),) * 2, (slice(0, 3), slice(0, 200)),
    )  # fmt: skip
    nothing = np.zeros((3, 200), np.float32)
    images = SliceImages(nothing, None, nothing.astype(int), nothing, None, 1.0, (0.0, 0.0), None)
    facts = slice_facts(0, queries, None, images.result, images.entropy, CLASSES)
    assert facts.contributing == 0 and facts.queries[0].share == 0
    (tmp_path / "x.png").write_bytes(draw_queries(images, queries, facts, CLASSES))
    assert matplotlib.image.imread(tmp_path / "x.png").shape[1] > 300
    assert draw_overview(images, queries, CLASSES).startswith(b"\x89PNG")
