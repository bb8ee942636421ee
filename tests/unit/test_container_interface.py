"""The container's view of input folders, model settings, files and time; no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from container_models import image, same_geometry, write_image, write_inputs_json
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from masksam_nnunet.errors import CaseError, DataError
from masksam_nnunet.inference.docker.errors import ContainerError, InputError, OptionError, OutputError
from masksam_nnunet.inference.docker.images import Geometry, stage, write_label_map
from masksam_nnunet.inference.docker.interface import Job, Sockets, find_jobs
from masksam_nnunet.inference.docker.meta_images import check_meta_image
from masksam_nnunet.inference.docker.time_limit import RESERVE, Deadline, Way, Work, choose, ways


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# ---- the platform's interface ----------------------------------------------------------------------------------------


def test_images_come_from_relative_path_not_from_the_slug(tmp_path: Path) -> None:
    touch(tmp_path, "images/mri-of-the-heart/0f3c.mha", "images/heart/decoy.mha", "age.json")
    write_inputs_json(tmp_path, heart="images/mri-of-the-heart")
    (job,) = find_jobs(tmp_path, Path("/out"), Sockets(output="heart-labels"), ["MRI"])
    assert job == Job((tmp_path / "images/mri-of-the-heart/0f3c.mha",), Path("/out/images/heart-labels/0f3c.mha"))


@pytest.mark.parametrize("key", ["socket", "interface"])
def test_inputs_json_of_older_and_newer_platforms(key: str, tmp_path: Path) -> None:
    touch(tmp_path, "images/ct/a.mha")
    socket = {"slug": "ct-image", "relative_path": "images/ct"}  # without super_kind
    text = {"slug": "report", "relative_path": "report.json"}
    (tmp_path / "inputs.json").write_text(json.dumps([{key: text}, {key: socket}]))
    (job,) = find_jobs(tmp_path, Path("/out"), Sockets(), ["CT"])
    assert job.channels == (tmp_path / "images/ct/a.mha",)


def test_channels_go_in_the_order_that_the_model_names(tmp_path: Path) -> None:
    touch(tmp_path, "images/t2/x.mha", "images/adc/y.mha", "images/prior/z.mha")
    write_inputs_json(tmp_path, adc_mri="images/adc", t2_mri="images/t2", prior="images/prior")
    (job,) = find_jobs(tmp_path, Path("/out"), Sockets(("t2-mri", "adc-mri")), ["T2", "ADC"])
    assert [file.name for file in job.channels] == ["x.mha", "y.mha"]
    assert job.target == Path("/out/images/segmentation/x.mha")


def test_several_cases_are_matched_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "images/adc/2.mha", "images/adc/1.mha", "images/t2/1.nii.gz", "images/t2/2.tif", "images/t2/.x.mha")
    jobs = find_jobs(tmp_path, Path("/out"), Sockets(("t2", "adc")), ["T2", "ADC"])
    assert [[file.name for file in job.channels] for job in jobs] == [["1.nii.gz", "1.mha"], ["2.tif", "2.mha"]]
    assert [job.target.name for job in jobs] == ["1.mha", "2.mha"]


def test_flat_folders_keep_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "amos_0007.nii.gz", "amos_0001.nii.gz", "readme.txt")
    jobs = find_jobs(tmp_path, Path("/out"), Sockets(), ["CT"])
    assert [job.target for job in jobs] == [Path("/out/amos_0001.nii.gz"), Path("/out/amos_0007.nii.gz")]


def test_flat_folders_with_channels(tmp_path: Path) -> None:
    touch(tmp_path, "b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz")
    jobs = find_jobs(tmp_path, Path("/out"), Sockets(), ["T1", "T2"])
    assert [job.target.name for job in jobs] == ["a.nii.gz", "b.nii.gz"]
    assert [file.name for file in jobs[1].channels] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def nothing(root: Path) -> None:
    pass


def absent(root: Path) -> None:
    root.rmdir()


def no_image_in_the_folder(root: Path) -> None:
    touch(root, "images/ct/report.pdf")
    write_inputs_json(root, ct="images/ct")


def folder_listed_but_missing(root: Path) -> None:
    write_inputs_json(root, ct="images/ct")


def no_images_listed(root: Path) -> None:
    write_inputs_json(root)


def outside(root: Path) -> None:
    touch(root.parent, "secret/a.mha")
    write_inputs_json(root, ct="../secret")


def broken_json(root: Path) -> None:
    (root / "inputs.json").write_text("[{")


def another_json(root: Path) -> None:
    (root / "inputs.json").write_text('[{"slug": "ct"}]')


def an_object(root: Path) -> None:
    (root / "inputs.json").write_text("{}")


def three_sockets(root: Path) -> None:
    touch(root, "images/a/x.mha", "images/b/x.mha", "images/c/x.mha")


def different_names(root: Path) -> None:
    touch(root, "images/t2/1.mha", "images/t2/2.mha", "images/adc/1.mha", "images/adc/3.mha")


def same_names(root: Path) -> None:
    touch(root, "images/ct/1.mha", "images/ct/1.nii.gz")


def unnumbered(root: Path) -> None:
    touch(root, "case.nii.gz")


T2_ADC = Sockets(("t2", "adc"))


@pytest.mark.parametrize(
    ("make", "sockets", "channels", "message"),
    [
        (absent, Sockets(), 1, r"there is no such folder; mount it"),
        (nothing, Sockets(), 1, r"no inputs\.json, no images/SLUG/\*\.mha and no images: it is empty"),
        (no_image_in_the_folder, Sockets(), 1, r"images/ct holds no image: it holds report\.pdf"),
        (folder_listed_but_missing, Sockets(), 1, r"lists ct in images/ct, but .* does not exist"),
        (no_images_listed, Sockets(), 1, r"lists no image, but 1 other inputs"),
        (outside, Sockets(), 1, r"relative_path = '\.\./secret' of ct is not below"),
        (broken_json, Sockets(), 1, r"inputs\.json cannot be read as JSON"),
        (another_json, Sockets(), 1, r"has no socket with slug and relative_path"),
        (an_object, Sockets(), 1, r"is not a list of inputs"),
        (three_sockets, Sockets(), 1, r"3 sockets \(a, b, c\) and the model was trained on 1 channels \(c0\)"),
        (three_sockets, Sockets(), 3, r"3 sockets \(a, b, c\).*--channels or in the model's container\.json"),
        (three_sockets, Sockets(("a", "b", "c")), 2, r"images of 3 sockets \(a, b, c\), but the model .* 2 channels"),
        (three_sockets, T2_ADC, 2, r"no image of t2, adc; there are: a, b, c"),
        (different_names, T2_ADC, 2, r"do not hold the same cases: 2, 3 in one of them only"),
        (same_names, Sockets(), 1, r"several files named 1"),
        (unnumbered, Sockets(), 2, r"case\.nii\.gz has no channel number, but the model has 2"),
    ],
)
def test_what_is_refused(
    make: Callable[[Path], None], sockets: Sockets, channels: int, message: str, tmp_path: Path
) -> None:
    source = tmp_path / "input"
    source.mkdir()
    make(source)
    with pytest.raises(InputError, match=message):
        find_jobs(source, tmp_path / "out", sockets, [f"c{number}" for number in range(channels)])


def test_container_json_and_what_overrides_it(tmp_path: Path) -> None:
    assert Sockets.read(tmp_path) == Sockets((), "segmentation")
    (tmp_path / "container.json").write_text('{"channels": ["t2", "adc"], "output": "images/lesion-map"}')
    assert Sockets.read(tmp_path) == Sockets(("t2", "adc"), "lesion-map")
    assert Sockets.read(tmp_path, ["a"], "b") == Sockets(("a",), "b")


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"output": "../x"}', '{"output": ""}', '{"output": 3, "channel": 1}', '{"channels": "t2"}',
     '{"channels": ["a", "a"]}', '{"channels": [1]}', '{"output": "a/b"}'],
)  # fmt: skip
def test_a_wrong_container_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "container.json").write_text(text)
    with pytest.raises(OptionError):
        Sockets.read(tmp_path)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_damaged_meta_images_are_found(tmp_path: Path) -> None:
    """ITK reads zeros where compressed data are damaged; anywhere in them is noticed here."""
    file = write_image(tmp_path / "a.mha")
    check_meta_image(file)
    whole = file.read_bytes()
    data = whole.index(b"LOCAL\n") + len(b"LOCAL\n")
    other = tmp_path / "b.mha"
    for place in range(data, len(whole), max(1, (len(whole) - data) // 40)):
        other.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(DataError):
            check_meta_image(other)
        other.write_bytes(whole[:place])
        with pytest.raises(DataError, match=r"cut off|header"):
            check_meta_image(other)
    for content in (b"", b"no image at all", whole.replace(b"LOCAL", b"x.raw")):
        other.write_bytes(content)
        with pytest.raises(DataError):
            check_meta_image(other)


def test_meta_images_without_compression_pass(tmp_path: Path) -> None:
    file = tmp_path / "a.mha"
    sitk.WriteImage(image(), str(file), False)
    check_meta_image(file)


def test_formats_that_the_reader_has_are_linked_and_others_converted(tmp_path: Path) -> None:
    files = [write_image(tmp_path / name) for name in ("a.mha", "b.nii.gz")]
    for number, reader in enumerate((SimpleITKIO(), NibabelIOWithReorient())):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = stage(files, folder, ".nii.gz", reader)
        assert [file.is_symlink() for file in case.files] == [number == 0, True]
        arrays, properties = reader.read_images([str(file) for file in case.files])
        assert arrays.shape[0] == 2 and np.allclose(arrays[0], arrays[1])
        assert sorted(properties["spacing"]) == pytest.approx([0.9, 1.0, 1.1])


def test_a_colour_picture_becomes_what_its_model_reads(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / "a.mha"))
    (tmp_path / "s").mkdir()
    case = stage([tmp_path / "a.mha"], tmp_path / "s", ".png", NaturalImage2DIO())
    array, _ = NaturalImage2DIO().read_images([str(case.files[0])])
    assert np.array_equal(array[:, 0], np.moveaxis(pixels, -1, 0))


def test_four_dimensions_and_other_files_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Image([4, 4, 4, 2], sitk.sitkFloat32), str(tmp_path / "a.mha"))
    with pytest.raises(CaseError, match="has 4 dimensions: give each channel"):
        Geometry.of(tmp_path / "a.mha")
    (tmp_path / "b.mha").write_bytes(b"nothing")
    with pytest.raises(CaseError, match="cannot be read"):
        Geometry.of(tmp_path / "b.mha")


@pytest.mark.parametrize(("largest", "kind"), [(255, sitk.sitkUInt8), (256, sitk.sitkUInt16)])
def test_label_maps_have_the_images_geometry(largest: int, kind: int, tmp_path: Path) -> None:
    source = write_image(tmp_path / "a.mha")
    labels = np.zeros(image().GetSize()[::-1], np.uint16)
    labels[1, 2, 3] = largest
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / "labels.nii.gz"))  # without any geometry
    target = tmp_path / "out" / "images" / "x" / "a.mha"
    counts = write_label_map(tmp_path / "labels.nii.gz", target, Geometry.of(source))
    assert counts == {0: labels.size - 1, largest: 1}
    assert [file.name for file in target.parent.iterdir()] == ["a.mha"]
    written = sitk.ReadImage(str(target))
    assert written.GetPixelID() == kind and np.array_equal(sitk.GetArrayFromImage(written), labels)
    assert same_geometry(written, sitk.ReadImage(str(source)))


def test_a_label_map_of_another_size_and_an_unwritable_output(tmp_path: Path) -> None:
    source = write_image(tmp_path / "a.mha")
    sitk.WriteImage(sitk.Image([3, 4, 5], sitk.sitkUInt8), str(tmp_path / "labels.nii.gz"))
    with pytest.raises(CaseError, match=re.escape("(3, 4, 5) voxels, the image (30, 28, 4)")):
        write_label_map(tmp_path / "labels.nii.gz", tmp_path / "out.mha", Geometry.of(source))
    (tmp_path / "file").touch()
    geometry = Geometry.of(tmp_path / "labels.nii.gz")
    with pytest.raises(OutputError, match="cannot write"):
        write_label_map(tmp_path / "labels.nii.gz", tmp_path / "file" / "out.mha", geometry)
    assert not (tmp_path / "out.mha").exists()


# ---- time ------------------------------------------------------------------------------------------------------------


def test_mirroring_goes_before_folds() -> None:
    assert ways(3, 8) == [Way(3, 8), Way(3, 1), Way(2, 1), Way(1, 1)]
    assert ways(2, 1) == [Way(2, 1), Way(1, 1)]
    assert [str(way) for way in ways(2, 8)] == ["2 folds, 8 mirrors", "2 folds, no mirroring", "1 fold, no mirroring"]


@pytest.mark.parametrize(
    ("left", "way"),
    [(1e9, Way(5, 8)), (1205, Way(5, 8)), (1204, Way(5, 1)), (155, Way(5, 1)), (154, Way(4, 1)), (94, Way(2, 1)),
     (35, Way(1, 1)), (0, Way(1, 1)), (-50, Way(1, 1))],
)  # fmt: skip
def test_the_best_that_fits(left: float, way: Way) -> None:
    work = Work(windows=100, seconds=0.3, writing=5)  # 30 s a fold and mirror
    assert choose(work, ways(5, 8), left) == way


def test_a_deadline_counts_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline(20)
    assert deadline.passed() > 0.1, "imports come first"
    monkeypatch.setattr("time.time", lambda: deadline.started + 100)
    assert deadline.left() == pytest.approx(1200 * (1 - RESERVE) - 100)
    assert Deadline(0).left() == float("inf")


def test_each_error_has_its_exit_code() -> None:
    codes = [kind.exit_code for kind in ContainerError.__subclasses__()]
    assert sorted(codes) == [2, 3, 4, 5]
