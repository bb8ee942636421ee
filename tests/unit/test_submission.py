"""Packaging for challenges: what is accepted arrives whole and under its right name, all else is refused by name."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from challenge_replicas import (
    AMOS_LABELS,
    acdc_frames,
    build_acdc,
    build_amos,
    build_msd,
    build_synapse,
    files,
    macos_file,
    nnunet_folders,
    volume,
)
from nnunet_workspace import SHARED
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import SubmissionError
from masksam_nnunet.inference.submission import archive as archive_module
from masksam_nnunet.inference.submission.inspection import Inspection, Request, inspect
from masksam_nnunet.inference.submission.package import package
from masksam_nnunet.inference.submission.rules import CHALLENGES, load_rules
from masksam_nnunet.plans.datasets.convert import convert
from masksam_nnunet.plans.datasets.synapse import ORGANS_8, ORGANS_13


def submit(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["submit", *map(str, arguments)])


def predict(images: Path, folder: Path, labels: Mapping[str, int], io: Any = None) -> None:
    """What nnU-Net writes: for each CASE_0000 a label map of all values, by its own reader and writer."""
    io = io or SimpleITKIO()
    folder.mkdir(parents=True)
    values = sorted(labels.values())
    for path in sorted(images.glob("*_0000.nii.gz")):
        array, properties = io.read_images([str(path)])
        seg = np.random.default_rng(len(path.name)).choice(values, array.shape[1:]).astype(np.uint8)
        seg.ravel()[: len(values)] = values[: seg.size]
        io.write_seg(seg, str(folder / path.name.replace("_0000", "")), properties)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    (folder / "plans.json").write_text("{}")
    (folder / "predict_from_raw_data_args.json").write_text("{}")


def unpack(out: Path, target: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(out) as archive:
        archive.extractall(target)
        return archive.infolist()


def same_place(submitted: Path, image: Path) -> None:
    """Shape, and both of NIfTI's placements, are those of the image to the last bit."""
    made, source = nibabel.load(submitted), nibabel.load(image)
    assert made.shape == source.shape[:3]
    assert made.get_data_dtype() == np.uint8
    for header in ("get_sform", "get_qform"):
        one, code = getattr(made, header)(coded=True)
        two, source_code = getattr(source, header)(coded=True)
        assert code == source_code
        assert np.array_equal(one, two) if one is not None else two is None


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def acdc_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_acdc(tmp_path_factory.mktemp("acdc"), range(1, 6))


def test_acdc(acdc_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = nnunet_folders(tmp_path, monkeypatch)
    dataset = convert("acdc", acdc_source, 27, partial=True)
    assert dataset.parent == raw
    predictions, out = tmp_path / "predictions", tmp_path / "acdc.zip"
    predict(dataset / "imagesTs", predictions, {"background": 0, "RV": 1, "MLV": 2, "LVC": 3})

    result = submit("acdc", predictions, "--out", out, "-d", 27)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert 'unconfirmed rule: file_name = "{patient}_{phase}.nii.gz" (third party' in result.stderr
    assert "unconfirmed rule: labels" not in result.stderr

    members = unpack(out, tmp_path / "unpacked")
    assert [member.filename for member in members] == sorted(
        f"patient{n}_{phase}.nii.gz" for n in range(101, 151) for phase in ("ED", "ES")
    )
    assert {member.date_time for member in members} == {(1980, 1, 1, 0, 0, 0)}
    for number in (101, 117, 150):
        for phase, frame in zip(("ED", "ES"), acdc_frames(number), strict=True):
            case = f"patient{number}_frame{frame:02d}"
            submitted = tmp_path / "unpacked" / f"patient{number}_{phase}.nii.gz"
            assert np.array_equal(volume(submitted)[0], volume(predictions / f"{case}.nii.gz")[0])
            same_place(submitted, acdc_source / "testing" / f"patient{number}" / f"{case}.nii.gz")

    # The same from the download itself, whose Info.cfg names the frames, to the last byte.
    again = tmp_path / "again.zip"
    assert submit("acdc", predictions, "--out", again, "--images", acdc_source / "testing").exit_code == 0
    assert again.read_bytes() == out.read_bytes()


def test_frames_are_named_by_info_cfg_never_by_their_order(tmp_path: Path) -> None:
    source = build_acdc(tmp_path, (1,), (101, 102))
    folder = source / "testing" / "patient101"
    info = folder / "Info.cfg"
    info.write_text(
        info.read_text().replace("ED: 1\n", "ED: 99\n").replace("ES: ", "ED: 1\nES: ").replace("ED: 99", "")
    )
    first, second = acdc_frames(101)
    info.write_text(f"ED: {second}\nES: {first}\n")  # end-diastole is the later frame
    images = tmp_path / "images"
    images.mkdir()
    for path in source.glob("testing/*/patient*_frame??.nii.gz"):
        shutil.copy(path, images / path.name.replace(".nii", "_0000.nii"))
    predict(images, tmp_path / "p", {"background": 0, "RV": 1, "MLV": 2, "LVC": 3})
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"expected": None, "counts": None}))
    found = inspect(Request("acdc", tmp_path / "p", images=source / "testing", rules=rules))
    assert not found.defects
    by_name = {entry.name: entry.prediction.name for entry in found.entries}
    assert by_name["patient101_ED.nii.gz"] == f"patient101_frame{second:02d}.nii.gz"
    assert by_name["patient101_ES.nii.gz"] == f"patient101_frame{first:02d}.nii.gz"
    assert by_name["patient102_ED.nii.gz"] == f"patient102_frame{acdc_frames(102)[0]:02d}.nii.gz"
    with pytest.raises(SubmissionError, match=r"frame 01 is not always ED.*-d.*frames\.json.*--images.*Info\.cfg"):
        inspect(Request("acdc", tmp_path / "p", images=images, rules=rules))


@pytest.mark.parametrize("count", [100, 120])
def test_amos(tmp_path: Path, count: int) -> None:
    numbers = [*range(8, 108), *range(510, 530)][:count]
    source = build_amos(tmp_path, (1, 2), numbers, (3,))
    images = tmp_path / "images"
    images.mkdir()
    for path in source.glob("imagesVa/[!.]*"):
        shutil.copy(path, images / path.name.replace(".nii", "_0000.nii"))
    # Its model's values are in another order, and its names in another spelling.
    names = [name.replace("gall bladder", "Gallbladder").replace(" ", "_") for name in AMOS_LABELS]
    labels = {"background": 0} | {name: 16 - value for value, name in enumerate(names) if value}
    predictions, out = tmp_path / "predictions", tmp_path / "amos.zip"
    predict(images, predictions, labels, NibabelIOWithReorient())

    result = submit("amos", predictions, "--out", out, "--images", source / "imagesVa")
    assert result.exit_code == 0, result.output
    assert "a model trained on that dataset has seen them" in " ".join(result.stderr.split())
    assert [member.filename for member in unpack(out, tmp_path / "u")] == [
        f"results/amos_{n:04d}.nii.gz" for n in numbers
    ]
    for number in numbers[:5]:
        submitted, predicted = (
            volume(folder / f"amos_{number:04d}.nii.gz")[0] for folder in (tmp_path / "u" / "results", predictions)
        )
        assert np.array_equal(submitted, np.where(predicted == 0, 0, 16 - predicted.astype(int)))
        same_place(
            tmp_path / "u" / "results" / f"amos_{number:04d}.nii.gz", source / "imagesVa" / f"amos_{number:04d}.nii.gz"
        )

    (predictions / f"amos_{numbers[0]:04d}.nii.gz").unlink()
    defects = inspect(Request("amos", predictions, images=source / "imagesVa")).defects
    assert f"there are {count - 1} predictions, the challenge takes exactly 100 or 120" in defects
    assert f"amos_{numbers[0]:04d}.nii.gz: the prediction is missing (amos_{numbers[0]:04d}.nii.gz)" in defects
    assert len(defects) == 2


@pytest.mark.parametrize("organs", [13, 8])
def test_synapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, organs: int) -> None:
    nnunet_folders(tmp_path, monkeypatch)
    source = build_synapse(tmp_path)
    dataset = convert("synapse", source, 17, organs=organs, split="none")
    predictions, out = tmp_path / "predictions", tmp_path / "synapse.zip"
    labels = json.loads((dataset / "dataset.json").read_text())["labels"]
    assert len(labels) == organs + 1
    predict(dataset / "imagesTs", predictions, labels)
    (predictions / "dataset.json").unlink()  # that of the raw dataset will do

    result = submit("synapse", predictions, "--out", out, "-d", "Dataset017_Synapse" + str(organs))
    assert result.exit_code == 0, result.output
    assert ("the model does not know esophagus (5), inferior vena cava (9)" in result.stderr) == (organs == 8)
    assert [member.filename for member in unpack(out, tmp_path / "u")] == [
        f"label{n:04d}.nii.gz" for n in range(61, 81)
    ]
    own = ORGANS_8 if organs == 8 else ORGANS_13
    for number in (61, 70, 80):
        submitted = volume(tmp_path / "u" / f"label{number:04d}.nii.gz")[0]
        predicted = volume(predictions / f"img{number:04d}.nii.gz")[0]
        for value, organ in enumerate(own, start=1):
            assert np.array_equal(submitted == ORGANS_13.index(organ) + 1, predicted == value), organ
        same_place(tmp_path / "u" / f"label{number:04d}.nii.gz", source / "Test" / "img" / f"img{number:04d}.nii.gz")


def test_transunets_test_cases_are_no_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nnunet_folders(tmp_path, monkeypatch)
    dataset = convert("synapse", build_synapse(tmp_path), 17)
    predict(dataset / "imagesTs", tmp_path / "p", json.loads((dataset / "dataset.json").read_text())["labels"])
    found = inspect(Request("synapse", tmp_path / "p", dataset="17"))
    assert "img0001.nii.gz: label0001.nii.gz is none of the 20 files that the challenge takes" in found.defects
    assert "label0061.nii.gz: the prediction is missing" in found.defects
    assert len(found.defects) == 12 + 20 + 1
    assert "TransUNet's 12 test cases are labelled training cases" in found.notes[0]


def test_msd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nnunet_folders(tmp_path, monkeypatch)
    source = build_msd(tmp_path)
    dataset = convert("msd", source, 4, processes=1)
    predictions, out = tmp_path / "predictions", tmp_path / "msd.zip"
    predict(dataset / "imagesTs", predictions, {"background": 0, "posterior": 1, "anterior": 2})
    result = submit("msd", predictions, "--out", out, "-d", 4)
    assert result.exit_code == 0, result.output
    assert "9 of 10 tasks are missing: Task01_BrainTumour" in result.stderr
    names = [f"Task04_Hippocampus/hippocampus_00{n}.nii.gz" for n in (2, 5)]
    assert [member.filename for member in unpack(out, tmp_path / "u")] == names
    for name in names:
        submitted, predicted = volume(tmp_path / "u" / name)[0], volume(predictions / Path(name).name)[0]
        assert np.array_equal(submitted == 1, predicted == 2) and np.array_equal(submitted == 2, predicted == 1)
        same_place(tmp_path / "u" / name, source / "imagesTs" / Path(name).name)
    assert submit("msd", predictions, "--check", "-d", 4, "--task", "Task09_Spleen").exit_code == 1
    with pytest.raises(SubmissionError, match=r"--task Spleen: there are Task01_BrainTumour, Task02"):
        inspect(Request("msd", predictions, task="Spleen"))


def msd_task(root: Path, name: str, cases: list[str], labels: Mapping[str, int], channels: int = 1) -> Path:
    """Images as in the download, of several channels 4D, and predictions of them."""
    source = build_msd(root / "download", name, (1,), (), ("FLAIR",) * channels)
    nnunet = root / "nnunet" / name
    nnunet.mkdir(parents=True)
    for index, case in enumerate(cases):
        values = np.random.default_rng(index).integers(0, 9, (5, 6, 7, channels)[: 3 + (channels > 1)]).astype(np.int16)
        affine = np.diag([1.0 + index, 1.5, 2, 1])
        nibabel.save(nibabel.Nifti1Image(values, affine), source / "imagesTs" / f"{case}.nii.gz")
        first = values[..., 0] if channels > 1 else values
        nibabel.save(nibabel.Nifti1Image(first, affine), nnunet / f"{case}_0000.nii.gz")
    predict(nnunet, root / "predictions" / name, labels)
    return root / "predictions"


def test_several_tasks_of_msd_in_one_archive(tmp_path: Path) -> None:
    brain = {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}
    msd_task(tmp_path, "Task01_BrainTumour", ["BRATS_485", "BRATS_486"], brain, channels=4)
    predictions = msd_task(
        tmp_path, "Task03_Liver", ["liver_140", "liver_141", "liver_9"], {"background": 0, "liver": 1, "cancer": 2}
    )
    out = tmp_path / "msd.zip"
    result = submit("msd", predictions, "--out", out, "--images", tmp_path / "download")
    assert result.exit_code == 0, result.output
    assert "Task03_Liver: left out, since the challenge does not take them: liver_141" in result.stderr
    members = [member.filename for member in unpack(out, tmp_path / "u")]
    assert members == [
        "Task01_BrainTumour/BRATS_485.nii.gz",
        "Task01_BrainTumour/BRATS_486.nii.gz",
        "Task03_Liver/liver_140.nii.gz",
        "Task03_Liver/liver_9.nii.gz",
    ]
    for name in members:
        task, file = name.split("/")
        same_place(tmp_path / "u" / name, tmp_path / "download" / task / "imagesTs" / file)
    rules = tmp_path / "rules.json"
    rules.write_text('{"all_tasks": true, "tasks": {"Task03_Liver": {"left_out": []}}}')
    found = inspect(Request("msd", predictions, rules=rules))
    assert len(found.entries) == 5
    assert [defect[:26] for defect in found.defects] == ["8 of 10 tasks are missing:"]
    (predictions / "Task03_Liver" / "liver_140.nii.gz").unlink()
    found = inspect(Request("msd", predictions, images=tmp_path / "download"))
    assert found.defects == ("Task03_Liver/liver_140.nii.gz: the prediction is missing (liver_140.nii.gz)",)
    (predictions / "notes.txt").touch()
    with pytest.raises(SubmissionError, match=r"holds notes\.txt beside tasks"):
        inspect(Request("msd", predictions))


# --- every defect -----------------------------------------------------------------------------------------------------

SPLEEN = {"background": 0, "spleen": 1}


@pytest.fixture
def spleens(tmp_path: Path) -> Path:
    """A decathlon's task: sound predictions of six images, which lie beside them."""
    return (
        msd_task(tmp_path, "Task09_Spleen", [f"spleen_{n}" for n in (1, 4, 11, 15, 23, 30)], SPLEEN) / "Task09_Spleen"
    )


def checked(predictions: Path, **options: Any) -> Inspection:
    images = predictions.parents[1] / "download" / "Task09_Spleen"
    return inspect(Request("msd", predictions, **({"images": images} | options)))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    image = nibabel.load(path)
    values = change(np.asanyarray(image.dataobj))
    nibabel.save(nibabel.Nifti1Image(values, image.affine if affine is None else affine), path)


def with_value(value: float, dtype: Any = np.float32) -> Callable[[Path], None]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(dtype)
        values[1, 1, 1] = value
        return values

    return lambda path: rewrite(path, change)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def cut_inside(path: Path) -> None:
    """A whole gzip file of half a NIfTI file."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-50]))


def moved(path: Path) -> None:
    affine = nibabel.load(path).affine.copy()
    affine[0, 3] += 5
    rewrite(path, lambda values: values, affine)


def other_spacing(path: Path) -> None:
    rewrite(path, lambda values: values, np.diag([3.0, 1.5, 2, 1]))


def flipped(path: Path) -> None:
    affine = nibabel.load(path).affine.copy()
    affine[:3, 1] *= -1
    rewrite(path, lambda values: values, affine)


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing case": (lambda p: p.unlink(), "spleen_11.nii.gz: the prediction is missing (spleen_11.nii.gz)"),
    "stray file": (lambda p: (p.parent / "notes.txt").touch(), "notes.txt: this file does not belong there"),
    "stray folder": (lambda p: (p.parent / "old").mkdir(), "old/: a folder does not belong there"),
    "stray case": (
        lambda p: shutil.copy(p, p.with_name("spleen_99.nii.gz")),
        "spleen_99.nii.gz: {images} holds no image of this case; it does not belong there",
    ),
    "foreign name": (
        lambda p: shutil.copy(p, p.with_name("liver_11.nii.gz")),
        "liver_11.nii.gz: the name is no case's, which are like spleen_\\d{{1,3}}.nii.gz",
    ),
    "wrong label": (
        with_value(2, np.uint8),
        "spleen_11.nii.gz: holds the labels 2, dataset.json has only 0, 1",
    ),
    "negative label": (
        with_value(-1, np.int16),
        "spleen_11.nii.gz: holds the labels -1, dataset.json has only 0, 1",
    ),
    "label beyond the type": (
        with_value(257, np.int32),
        "spleen_11.nii.gz: holds the labels 257, dataset.json has only 0, 1",
    ),
    "not whole": (
        with_value(0.5),
        "spleen_11.nii.gz: is no label map: 1 voxels are NaN, infinite or no whole numbers, such as 0.5 (float32); "
        "give label maps, not probabilities",
    ),
    "nearly whole": (
        with_value(0.999),
        "spleen_11.nii.gz: is no label map: 1 voxels are NaN, infinite or no whole numbers, such as 0.999 (float32); "
        "give label maps, not probabilities",
    ),
    "NaN": (
        with_value(np.nan),
        "spleen_11.nii.gz: is no label map: 1 voxels are NaN, infinite or no whole numbers, such as nan (float32); "
        "give label maps, not probabilities",
    ),
    "complex numbers": (
        with_value(1, np.complex64),
        "spleen_11.nii.gz: cannot be read, it is truncated or damaged: its voxels are complex64, not numbers; predict "
        "this case again",
    ),
    "other shape": (
        lambda p: rewrite(p, lambda values: values[:, :-1]),
        "spleen_11.nii.gz: shape (5, 5, 7) is not its image's (5, 6, 7); predict from the challenge's own images",
    ),
    "other dimensions": (
        lambda p: rewrite(p, lambda values: values[..., None].repeat(2, axis=3)),
        "spleen_11.nii.gz: has the shape (5, 6, 7, 2), a label map has 3 dimensions",
    ),
    "other origin": (
        moved,
        "spleen_11.nii.gz: origin (5, 0, 0) is not its image's (0, 0, 0); predict from the challenge's own images",
    ),
    "other spacing": (
        lambda p: rewrite(p, lambda values: values, np.diag([9.0, 1.5, 2, 1])),
        "spleen_11.nii.gz: spacing (9, 1.5, 2) is not its image's (3, 1.5, 2); predict from the challenge's own images",
    ),
    "other direction": (
        flipped,
        "spleen_11.nii.gz: direction (1, 0, 0, 0, -1, 0, 0, 0, 1) is not its image's (1, 0, 0, 0, 1, 0, 0, 0, 1); "
        "predict from the challenge's own images",
    ),
    "truncated": (
        truncated,
        "spleen_11.nii.gz: cannot be read, it is truncated or damaged: Compressed file ended before the end-of-stream "
        "marker was reached; predict this case again",
    ),
    "truncated inside": (
        cut_inside,
        "spleen_11.nii.gz: cannot be read, it is truncated or damaged: it holds 512 bytes, its header says 562 "
        "(5 x 6 x 7 voxels); predict this case again",
    ),
    "wrong extension": (
        lambda p: p.rename(p.with_suffix("")),
        "spleen_11.nii: wrong extension, predictions are spleen_11.nii.gz; predict with the file_ending .nii.gz",
    ),
    "two formats": (
        lambda p: p.with_suffix("").write_bytes(gzip.decompress(p.read_bytes())),
        "spleen_11: the case is there twice, as spleen_11.nii and spleen_11.nii.gz; remove all but one",
    ),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_is_named_and_nothing_written(spleens: Path, tmp_path: Path, kind: str) -> None:
    spoil, message = DEFECTS[kind]
    assert checked(spleens).defects == ()
    spoil(spleens / "spleen_11.nii.gz")
    place = spleens.parents[1] / "download" / "Task09_Spleen"
    assert checked(spleens).defects == (message.format(images=place),)
    out = tmp_path / "out" / "spleen.zip"
    before = files(spleens)
    result = submit("msd", spleens, "--images", place, "--out", out)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert f"1 defect, nothing was written:\n  {message.format(images=place)}\n" in result.stderr
    assert not out.parent.exists() and files(spleens) == before


def test_not_readable_is_a_defect(spleens: Path, tmp_path: Path) -> None:
    (spleens / "spleen_11.nii.gz").unlink()
    (spleens / "spleen_11.nii.gz").symlink_to(tmp_path / "moved away")
    (defect,) = checked(spleens).defects
    assert defect.startswith("spleen_11.nii.gz: cannot be read") and "No such file" in defect


def test_a_probability_in_a_scaled_file_is_no_label(spleens: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((5, 6, 7), np.int16), np.diag([3, 1.5, 2, 1]))
    image.header.set_slope_inter(0.005, 0)
    nibabel.save(image, spleens / "spleen_11.nii.gz")
    (defect,) = checked(spleens).defects
    assert "210 voxels are NaN, infinite or no whole numbers, such as 0.005" in defect


def test_all_defects_at_once(spleens: Path) -> None:
    with_value(7, np.uint8)(spleens / "spleen_1.nii.gz")
    truncated(spleens / "spleen_4.nii.gz")
    moved(spleens / "spleen_15.nii.gz")
    (spleens / "spleen_23.nii.gz").unlink()
    (spleens / "README").touch()
    (spleens / "dataset.json").write_text('{"labels": {"background": 0, "spleen": 1, "liver": 2}}')
    place = spleens.parents[1] / "download" / "Task09_Spleen"
    result = submit("msd", spleens, "--check", "--images", place)
    assert result.exit_code == 1
    lines = [line.strip() for line in result.stderr.splitlines()]
    start = next(index for index, line in enumerate(lines) if "6 defects" in line)
    assert [line.split(" ")[0] for line in lines[start + 1 :]] == [
        "label", "README:", "spleen_23.nii.gz:", "spleen_1.nii.gz:", "spleen_15.nii.gz:", "spleen_4.nii.gz:"
    ]  # fmt: skip


def test_check_of_a_sound_folder(spleens: Path) -> None:
    before = files(spleens.parents[1])
    result = submit("msd", spleens, "--check", "--images", spleens.parents[1] / "download" / "Task09_Spleen")
    assert result.exit_code == 0
    assert result.stdout == "Medical Segmentation Decathlon, live challenge: 6 files, no defects\n"
    assert files(spleens.parents[1]) == before


def test_what_is_passed_over(spleens: Path) -> None:
    np.savez(spleens / "spleen_11.npz", probabilities=np.zeros(3))
    (spleens / "spleen_11.pkl").touch()
    (spleens / "summary.json").touch()
    macos_file(spleens / "spleen_11.nii.gz")
    (spleens / ".DS_Store").touch()
    found = checked(spleens)
    assert found.defects == () and len(found.entries) == 6
    assert "2 files of probabilities (.npz, .pkl) are left out" in found.notes


def test_whole_numbers_of_other_types_are_cast(spleens: Path, tmp_path: Path) -> None:
    rewrite(spleens / "spleen_1.nii.gz", lambda values: values.astype(np.float64))
    rewrite(spleens / "spleen_4.nii.gz", lambda values: values.astype(np.int32))
    stored = np.asanyarray(nibabel.load(spleens / "spleen_11.nii.gz").dataobj).astype(np.int16) * 3000
    scaled = nibabel.Nifti1Image(stored, np.diag([3, 1.5, 2, 1]))
    scaled.header.set_slope_inter(1 / 3000, 0)  # 0.99999994
    nibabel.save(scaled, spleens / "spleen_11.nii.gz")
    rewrite(spleens / "spleen_15.nii.gz", np.zeros_like)
    assert volume(spleens / "spleen_11.nii.gz")[0].dtype == np.float64
    found = checked(spleens)
    assert found.defects == ()
    assert "background only: spleen_15.nii.gz" in found.notes
    package(found, tmp_path / "out.zip")
    unpack(tmp_path / "out.zip", tmp_path / "u")
    for case in ("spleen_1", "spleen_4", "spleen_11"):
        submitted = volume(tmp_path / "u" / "Task09_Spleen" / f"{case}.nii.gz")[0]
        assert submitted.dtype == np.uint8
        assert np.array_equal(submitted, np.rint(volume(spleens / f"{case}.nii.gz")[0]))


def test_either_placement_of_a_header_will_do(spleens: Path, tmp_path: Path) -> None:
    """An image with two placements: nnU-Net's prediction repeats the one that its reader took."""
    path = spleens.parents[1] / "download" / "Task09_Spleen" / "imagesTs" / "spleen_11.nii.gz"
    image = nibabel.load(path)
    image.set_qform(image.affine, 1)
    other = image.affine.copy()
    other[:3, 3] = 40, 50, 60
    image.set_sform(other, 1)
    nibabel.save(image, path)
    nnunet = tmp_path / "two"
    nnunet.mkdir()
    shutil.copy(path, nnunet / "spleen_11_0000.nii.gz")
    for io in (SimpleITKIO(), NibabelIOWithReorient()):
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        predict(nnunet, tmp_path / "p", SPLEEN, io)
        shutil.copy(tmp_path / "p" / "spleen_11.nii.gz", spleens / "spleen_11.nii.gz")
        found = checked(spleens)
        assert found.defects == ()
        package(found, tmp_path / "out.zip")
        unpack(tmp_path / "out.zip", tmp_path / "u")
        same_place(tmp_path / "u" / "Task09_Spleen" / "spleen_11.nii.gz", path)


def test_texts_of_the_images_headers_stay_here(spleens: Path, tmp_path: Path) -> None:
    path = spleens.parents[1] / "download" / "Task09_Spleen" / "imagesTs" / "spleen_11.nii.gz"
    image = nibabel.load(path)
    image.header["descrip"], image.header["db_name"] = b"Jane Doe", b"Jane Doe"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nibabel.save(image, path)
    package(checked(spleens), tmp_path / "out.zip")
    unpack(tmp_path / "out.zip", tmp_path / "u")
    content = gzip.decompress((tmp_path / "u" / "Task09_Spleen" / "spleen_11.nii.gz").read_bytes())
    assert b"Jane" in gzip.decompress(path.read_bytes()) and b"Jane" not in content


def test_without_images(spleens: Path) -> None:
    moved(spleens / "spleen_11.nii.gz")
    found = checked(spleens, images=None)
    assert found.defects == ()
    assert any(
        "nothing is compared with the challenge's images, and missing cases cannot be told" in n for n in found.notes
    )


# --- labels by name ---------------------------------------------------------------------------------------------------


def describe(predictions: Path, labels: object) -> None:
    (predictions / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_labels_that_do_not_match(spleens: Path, tmp_path: Path) -> None:
    describe(spleens, {"background": 0, "Milz": 1})
    unknown, lacking = checked(spleens).defects
    assert unknown.startswith(
        "label 'Milz' (1) in dataset.json is none of the challenge's (background, spleen); if it is"
    )
    assert lacking.startswith("dataset.json lacks labels of the challenge: spleen (1)")
    rules = tmp_path / "rules.json"
    rules.write_text('{"also_called": {"spleen": ["milz"]}}')
    assert checked(spleens, rules=rules).defects == ()
    describe(spleens, {"background": 0, "spleen": 1, "Spleen": 2})
    assert checked(spleens).defects == (
        "labels 'spleen' and 'Spleen' in dataset.json are both 'spleen' of the challenge",
    )
    describe(spleens, {"background": 0, "spleen": 1, "ignore": 2})
    assert checked(spleens).defects == ()
    with_value(2, np.uint8)(spleens / "spleen_4.nii.gz")
    assert checked(spleens).defects == ("spleen_4.nii.gz: holds the labels 2, dataset.json has only 0, 1",)


def test_other_descriptions(spleens: Path, tmp_path: Path) -> None:
    for labels, message in (
        ({"background": 0, "organ": [1, 2]}, r"has regions \(organ\).*--dataset-json"),
        ({"background": 0, "spleen": "1"}, r"labels must be whole numbers, not \{'spleen': '1'\}"),
        ([], r'has no "labels".*--dataset-json'),
    ):
        describe(spleens, labels)
        with pytest.raises(SubmissionError, match=message):
            checked(spleens)
    (tmp_path / "other.json").write_text(json.dumps({"labels": SPLEEN}))
    assert checked(spleens, dataset_json=tmp_path / "other.json").defects == ()
    (spleens / "dataset.json").write_text("{")
    with pytest.raises(SubmissionError, match=r"dataset\.json cannot be read"):
        checked(spleens)
    (spleens / "dataset.json").unlink()
    with pytest.raises(SubmissionError, match=r"there is no .*dataset\.json, which names the labels.*never by number"):
        checked(spleens)


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("challenge", CHALLENGES)
def test_every_rule_has_its_source(challenge: str) -> None:
    rules = load_rules(challenge)
    for rule in rules.unconfirmed:
        assert rule.source and hasattr(rules, rule.name)
    assert {rule.name for rule in rules.unconfirmed} >= {"dtype"}
    for task in rules.tasks or [None]:
        own = rules.of_task(task) if task else rules
        assert own.labels["background"] == 0
        assert sorted(own.labels.values()) == list(range(len(own.labels)))
        assert set(own.also_called) <= set(own.labels) or rules.tasks


def test_own_rules(spleens: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(
        json.dumps(
            {
                "folder": "submission/{task}",
                "file_name": "seg_{case}.nii.gz",
                "dtype": "int16",
                "tasks": {"Task09_Spleen": {"labels": {"background": 0, "spleen": 300}, "counts": [6]}},
            }
        )
    )
    out, place = tmp_path / "out.zip", spleens.parents[1] / "download" / "Task09_Spleen"
    result = submit("msd", spleens, "--out", out, "--images", place, "--rules", rules)
    assert result.exit_code == 0, result.output
    assert "unconfirmed rule: all_tasks" in result.stderr
    for own in ("folder", "file_name", "dtype", "tasks"):
        assert f"unconfirmed rule: {own}" not in result.stderr
    names = [member.filename for member in unpack(out, tmp_path / "u")]
    assert names[0] == "submission/Task09_Spleen/seg_spleen_1.nii.gz" and len(names) == 6
    submitted = volume(tmp_path / "u" / names[0])[0]
    assert submitted.dtype == np.int16 and set(np.unique(submitted)) == {0, 300}
    (spleens / "spleen_30.nii.gz").unlink()
    assert "there are 5 predictions, the challenge takes exactly 6" in checked(spleens, rules=rules).defects
    assert load_rules("msd", rules).of_task("Task03_Liver").labels["cancer"] == 2  # the others as they were


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", r"holds \[\]; give an object"),
        ('{"folders": "x"}', "there is no rule 'folders', there are case, file_name, folder"),
        ('{"tasks": {}}', "there is no rule 'tasks'"),
        ('{"folder": "../x"}', r"'folder' must be a folder.*without \.\. or leading /, not '\.\./x'"),
        ('{"folder": "/x"}', "'folder' must be"),
        ('{"folder": "{task}"}', "'folder' '{task}' may hold no field"),
        ('{"file_name": "x.nii"}', r"'file_name' must be a name ending in \.nii\.gz"),
        ('{"file_name": "a/{number}.nii.gz"}', "'file_name' must be"),
        (
            '{"file_name": "{id}.nii.gz"}',
            "'file_name' '{id}.nii.gz' needs id, but 'case'.* gives only case, number, phase",
        ),
        ('{"file_name": "{.nii.gz"}', "'file_name' must be"),
        ('{"case": "("}', r"'case' must be a regular expression.*not '\('"),
        ('{"labels": {"spleen": 1}}', "'labels' must be"),
        ('{"labels": {"background": 0, "a": 1, "b": 1}}', "'labels' must be"),
        ('{"labels": {"background": 0, "a": 256}}', "the label 256 does not fit into 'dtype' uint8"),
        ('{"dtype": "float64"}', "'dtype' must be uint8 or int16"),
        ('{"counts": [0]}', "'counts' must be"),
        ('{"counts": 100}', "'counts' must be"),
        ('{"expected": {"case": []}}', "'expected' must be"),
        ('{"expected": {"case": ["a"]}}', "'expected' lists case, but 'file_name'.*has number"),
        ('{"all_labels": 1}', "'all_labels' must be true or false, not 1"),
        ('{"left_out": "x"}', "'left_out' must be"),
        ('{"also_called": {"a": "b"}}', "'also_called' must be"),
        ('{"folder": 1, "dtype": 2}', "'folder' must be.*; 'dtype' must be"),
    ],
)
def test_rules_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(content)
    with pytest.raises(SubmissionError, match=rf"--rules {rules}.*{message}"):
        load_rules("amos", rules)


def test_rules_of_tasks_that_cannot_be(tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    for content, message in (
        ({"Task09_Spleen": {"label": {}}}, "'Task09_Spleen': there is no rule 'label', tasks have case, labels"),
        ({"Task09_Spleen": {"counts": "6"}}, "'Task09_Spleen': 'counts' must be"),
        ({"Task11_New": {"case": "x"}}, "Task11_New: there is no labels"),
        ([], "'tasks' must be"),
    ):
        rules.write_text(json.dumps({"tasks": content}))
        with pytest.raises(SubmissionError, match=message):
            load_rules("msd", rules)


# --- the archive ------------------------------------------------------------------------------------------------------


def test_the_same_input_makes_the_same_archive(spleens: Path, tmp_path: Path) -> None:
    package(checked(spleens), tmp_path / "one.zip")
    for path in spleens.iterdir():
        os.utime(path, (1, 1))
    package(checked(spleens), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.testzip() is None
        assert {(m.external_attr >> 16, m.create_system, m.compress_type) for m in archive.infolist()} == {
            (0o644, 3, 8)
        }


def test_places_where_nothing_is_put(spleens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    out.write_bytes(b"earlier")
    place = spleens.parents[1] / "download" / "Task09_Spleen"
    for target, message in (
        (out, "is there already, nothing was changed; give another name, or --force"),
        (tmp_path / "out.tar", "give a name that ends in .zip"),
        (spleens / "out.zip", "lies in PREDICTIONS"),
    ):
        result = submit("msd", spleens, "--out", target, "--images", place)
        assert result.exit_code == 1 and message in result.stderr
    (tmp_path / "folder.zip").mkdir()
    assert "is a folder" in submit("msd", spleens, "--out", tmp_path / "folder.zip").stderr
    assert out.read_bytes() == b"earlier"
    assert submit("msd", spleens, "--out", out, "--images", place, "--force").exit_code == 0
    assert zipfile.is_zipfile(out)
    for wrong in (["--check", "--out", out], []):
        assert submit("msd", spleens, *wrong).exit_code == 2
    for options, message in (
        ({"predictions": tmp_path / "none"}, "PREDICTIONS .*none: there is no such folder"),
        ({"images": tmp_path / "none"}, "--images .*none: there is no such folder"),
        ({"images": tmp_path / "folder.zip"}, "holds no image of a case like"),
    ):
        with pytest.raises(SubmissionError, match=message):
            inspect(Request(**({"challenge": "msd", "predictions": spleens, "task": "Task09_Spleen"} | options)))


def test_a_full_disk_leaves_what_was_there(spleens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "full" / "out.zip"
    out.parent.mkdir()
    out.write_bytes(b"earlier")
    written = 0

    def full(archive: zipfile.ZipFile, *arguments: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writestr(archive, *arguments, **options)

    writestr = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    place = spleens.parents[1] / "download" / "Task09_Spleen"
    result = submit("msd", spleens, "--out", out, "--images", place, "--force")
    assert result.exit_code == 1 and written == 4
    assert f"cannot write {out}: No space left on device; nothing of it was kept" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == ["out.zip"] and out.read_bytes() == b"earlier"


def test_what_is_read_back_wrong_is_not_kept(spleens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, out = checked(spleens), tmp_path / "out" / "out.zip"

    def other_voxels(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        voxels, affine = read(content)
        return voxels[::-1], affine

    read = archive_module.read_submitted
    with monkeypatch.context() as patched:
        patched.setattr(archive_module, "read_submitted", other_voxels)
        with pytest.raises(SubmissionError, match=r"spleen_1\.nii\.gz in it has other voxels.*nothing of it was kept"):
            package(found, out)
    assert not list(out.parent.iterdir())
    with_value(9, np.uint8)(spleens / "spleen_30.nii.gz")  # after the check
    with pytest.raises(SubmissionError, match=r"spleen_30\.nii\.gz has changed since it was checked"):
        package(found, out)
    assert not list(out.parent.iterdir())


def test_real_label_maps(tmp_path: Path) -> None:
    """True ACDC volumes posing as predictions; the ones at hand are training patients, which own rules allow."""
    dataset = SHARED / "Dataset027_ACDC"
    if not dataset.is_dir():
        pytest.skip(f"no real volumes in {dataset}")
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTr").glob("*.nii.gz"))
    raw, predictions = tmp_path / "Dataset027_ACDC", tmp_path / "predictions"
    raw.mkdir()
    predictions.mkdir()
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).symlink_to(dataset / folder)
    frames = {case: "ED" if case.endswith("_frame01") else "ES" for case in cases}  # true of these patients
    (raw / "frames.json").write_text(json.dumps(frames))
    for case in cases:
        (predictions / f"{case}.nii.gz").symlink_to(dataset / "labelsTr" / f"{case}.nii.gz")
    (predictions / "dataset.json").symlink_to(dataset / "dataset.json")

    refused = submit("acdc", predictions, "--check", "--images", raw / "imagesTr")
    assert refused.exit_code == 1
    assert "patient001_frame01.nii.gz: patient001_ED.nii.gz is none of the 100 files" in refused.stderr
    rules, out = tmp_path / "rules.json", tmp_path / "acdc.zip"
    rules.write_text('{"expected": null, "counts": [40]}')
    result = submit("acdc", predictions, "--out", out, "--images", raw / "imagesTr", "--rules", rules)
    assert result.exit_code == 0, result.output
    members = unpack(out, tmp_path / "u")
    assert len(members) == len(cases) == 40
    for case in cases:
        name = f"{case.split('_')[0]}_{frames[case]}.nii.gz"
        assert np.array_equal(volume(tmp_path / "u" / name)[0], volume(dataset / "labelsTr" / f"{case}.nii.gz")[0])
        same_place(tmp_path / "u" / name, dataset / "imagesTr" / f"{case}_0000.nii.gz")
