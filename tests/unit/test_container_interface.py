"""The container's view of input folders, options and files; no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from made_up_models import image, same_geometry, write_image, write_inputs_json
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from masksam_nnunet.errors import CaseError, DataError, UsageError
from masksam_nnunet.inference.docker.images import read_header, stage, write_label_map
from masksam_nnunet.inference.docker.interface import ContainerOptions, OutputError, find_jobs
from masksam_nnunet.plans.images import check_whole, read_image


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# ---- the platform's interface ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["socket", "interface"])
def test_inputs_json_of_older_and_newer_platforms(key: str, tmp_path: Path) -> None:
    touch(tmp_path, "images/ct/a.mha")
    socket = {"slug": "ct-image", "relative_path": "images/ct"}  # without super_kind
    text = {"slug": "report", "relative_path": "report.json"}
    (tmp_path / "inputs.json").write_text(json.dumps([{key: text}, {key: socket}]))
    (job,) = find_jobs(tmp_path, Path("/out"), ContainerOptions(), ["CT"])
    assert job.channels == (tmp_path / "images/ct/a.mha",)


def test_channels_go_in_the_order_that_the_model_names(tmp_path: Path) -> None:
    touch(tmp_path, "images/t2/x.mha", "images/adc/y.mha", "images/prior/z.mha")
    write_inputs_json(tmp_path, adc_mri="images/adc", t2_mri="images/t2", prior="images/prior")
    (job,) = find_jobs(tmp_path, Path("/out"), ContainerOptions(channels=["t2-mri", "adc-mri"]), ["T2", "ADC"])
    assert [file.name for file in job.channels] == ["x.mha", "y.mha"]
    assert job.target == Path("/out/images/segmentation/x.mha")


def test_several_cases_are_matched_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "images/adc/2.mha", "images/adc/1.mha", "images/t2/1.nii.gz", "images/t2/2.tif", "images/t2/.x.mha")
    jobs = find_jobs(tmp_path, Path("/out"), ContainerOptions(channels=["t2", "adc"]), ["T2", "ADC"])
    assert [[file.name for file in job.channels] for job in jobs] == [["1.nii.gz", "1.mha"], ["2.tif", "2.mha"]]
    assert [job.target.name for job in jobs] == ["1.mha", "2.mha"]


def test_flat_folders_keep_their_names(tmp_path: Path) -> None:
    for files, channels, targets in (
        (["amos_0007.nii.gz", "amos_0001.nii.gz", "readme.txt"], ["CT"], ["amos_0001.nii.gz", "amos_0007.nii.gz"]),
        (["b_0001.nii", "b_0000.nii", "a_0000.nii", "a_0001.nii"], ["T1", "T2"], ["a.nii", "b.nii"]),
    ):
        source = touch(tmp_path / str(len(channels)), *files)
        jobs = find_jobs(source, Path("/out"), ContainerOptions(), channels)
        assert [job.target for job in jobs] == [Path("/out") / name for name in targets]
        assert all([*job.channels] == sorted(job.channels) and len(job.channels) == len(channels) for job in jobs)


def write_json(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "inputs.json").write_text(text)


def outside(root: Path) -> None:
    touch(root.parent, "secret/a.mha")
    write_inputs_json(root, ct="../secret")


def names(*files: str) -> Callable[[Path], object]:
    return lambda root: touch(root, *files)


T2_ADC = ["t2", "adc"]
THREE = names("images/a/x.mha", "images/b/x.mha", "images/c/x.mha")


@pytest.mark.parametrize(
    ("make", "slugs", "channels", "named"),
    [
        (lambda root: root.rmdir(), [], 1, "--input"),
        (names("images/ct/report.pdf"), [], 1, "report.pdf"),
        (lambda root: write_inputs_json(root, ct="images/ct"), [], 1, "images/ct"),
        (lambda root: write_inputs_json(root), [], 1, "no image"),
        (outside, [], 1, "secret"),
        (write_json("[{"), [], 1, "inputs.json"),
        (write_json('[{"slug": "ct"}]'), [], 1, "inputs.json"),
        (THREE, [], 3, "--channels"),
        (THREE, ["a", "b", "c"], 2, "c0, c1"),
        (THREE, T2_ADC, 2, "t2, adc"),
        (names("images/t2/1.mha", "images/t2/2.mha", "images/adc/1.mha", "images/adc/3.mha"), T2_ADC, 2, "2, 3"),
        (names("images/ct/1.mha", "images/ct/1.nii.gz"), [], 1, "images/ct"),
        (names("case.nii.gz"), [], 2, "case.nii.gz"),
    ],
)
def test_inputs_that_are_refused(
    make: Callable[[Path], object], slugs: list[str], channels: int, named: str, tmp_path: Path
) -> None:
    source = tmp_path / "input"
    source.mkdir()
    make(source)
    with pytest.raises(DataError, match=named):
        find_jobs(source, tmp_path / "out", ContainerOptions(channels=slugs), [f"c{n}" for n in range(channels)])


def test_container_json_and_what_overrides_it(tmp_path: Path) -> None:
    assert ContainerOptions.read(tmp_path) == ContainerOptions()
    file = tmp_path / "container.json"
    file.write_text('{"channels": ["t2", "adc"], "output": "lesion-map", "mirroring": false}')
    read = ContainerOptions.read(tmp_path, {"output": "b", "folds": ["0"], "mirroring": None})
    assert read == ContainerOptions(channels=["t2", "adc"], output="b", folds=["0"], mirroring=False)
    for text in ("[1]", "{", '{"output": "../x"}', '{"channel": 1}'):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"container\.json"):
            ContainerOptions.read(tmp_path)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_damaged_meta_images_are_found(tmp_path: Path) -> None:
    """ITK reads zeros where compressed data are damaged; anywhere in them is noticed here."""
    file = write_image(tmp_path / "a.mha")
    check_whole(file)
    whole = file.read_bytes()
    data = whole.index(b"LOCAL\n") + len(b"LOCAL\n")
    other = tmp_path / "b.mha"
    for place in range(data, len(whole), (len(whole) - data) // 8):
        for damaged in (whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :], whole[:place]):
            other.write_bytes(damaged)
            with pytest.raises(DataError):
                check_whole(other)
    for content in (b"", b"no image at all", whole.replace(b"LOCAL", b"x.raw")):
        other.write_bytes(content)
        with pytest.raises(DataError):
            check_whole(other)


def test_formats_that_the_reader_lacks_are_converted(tmp_path: Path) -> None:
    files = [write_image(tmp_path / name) for name in ("a.mha", "b.nii.gz")]
    for number, reader in enumerate((SimpleITKIO(), NibabelIOWithReorient())):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = stage(files, folder, ".nii.gz", reader)
        assert case.files == ((files[0] if number == 0 else folder / "0.nii"), files[1])
        arrays, properties = reader.read_images([str(file) for file in case.files])
        assert arrays.shape[0] == 2 and np.allclose(arrays[0], arrays[1])
        assert sorted(properties["spacing"]) == pytest.approx([0.9, 1.0, 1.1])


def test_a_tiff_model_knows_the_size_of_voxels(tmp_path: Path) -> None:
    case = stage([write_image(tmp_path / "a.mha")], tmp_path, ".tif", Tiff3DIO())
    _, properties = read_image(case.files[0], {"file_ending": ".tif"}, Tiff3DIO())
    assert properties["spacing"] == list(sitk.ReadImage(str(tmp_path / "a.mha")).GetSpacing()[::-1])


def test_four_dimensions_and_other_files_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Image([4, 4, 4, 2], sitk.sitkFloat32), str(tmp_path / "a.mha"))
    with pytest.raises(CaseError, match=r"a\.mha has 4"):
        read_header(tmp_path / "a.mha")
    (tmp_path / "b.mha").write_bytes(b"nothing")
    with pytest.raises(CaseError, match=r"b\.mha"):
        read_header(tmp_path / "b.mha")


@pytest.mark.parametrize(("largest", "kind"), [(255, sitk.sitkUInt8), (256, sitk.sitkUInt16)])
def test_label_maps_have_the_images_geometry(largest: int, kind: int, tmp_path: Path) -> None:
    source, predicted = write_image(tmp_path / "a.mha"), tmp_path / "labels.nii.gz"
    labels = np.zeros(image().GetSize()[::-1], np.uint16)
    labels[1, 2, 3] = largest
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(predicted))  # without any geometry
    target = tmp_path / "out" / "images" / "x" / "a.mha"
    assert write_label_map(predicted, target, read_header(source)) == {0: labels.size - 1, largest: 1}
    assert [file.name for file in target.parent.iterdir()] == ["a.mha"]
    written = sitk.ReadImage(str(target))
    assert written.GetPixelID() == kind and np.array_equal(sitk.GetArrayFromImage(written), labels)
    assert same_geometry(written, sitk.ReadImage(str(source)))
    with pytest.raises(OutputError, match=r"out\.mha"):
        write_label_map(predicted, source / "out.mha", read_header(source))
    sitk.WriteImage(sitk.Image([3, 4, 5], sitk.sitkUInt8), str(predicted))
    with pytest.raises(CaseError):
        write_label_map(predicted, target, read_header(source))
