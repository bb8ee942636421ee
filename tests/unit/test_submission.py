"""Packaging for challenges: what is accepted arrives whole and under its right name, all else is refused by name."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
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
    nnunet_folders,
    volume,
)
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.cli.submit import Challenge
from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.inference.submission.archive import package
from masksam_nnunet.inference.submission.inspection import Inspection, inspect
from masksam_nnunet.inference.submission.rules import CHALLENGES, load_rules
from masksam_nnunet.plans.datasets import convert
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


def test_acdc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nnunet_folders(tmp_path, monkeypatch)
    source = build_acdc(tmp_path, range(1, 6), (101, 117))
    first, second = acdc_frames(101)
    (source / "testing" / "patient101" / "Info.cfg").write_text(f"ED: {second}\nES: {first}\n")  # ED is not the first
    dataset = convert("acdc", source, 27, partial=True)
    predictions, out, rules = tmp_path / "predictions", tmp_path / "acdc.zip", tmp_path / "rules.json"
    predict(dataset / "imagesTs", predictions, {"background": 0, "RV": 1, "MLV": 2, "LVC": 3})
    defects = inspect("acdc", predictions, dataset="27").defects
    assert len(defects) == 97 and all("patient" in defect for defect in defects[:-1]) and "100" in defects[-1]

    expected = {"patient": ["patient101", "patient117"], "phase": ["ED", "ES"]}
    rules.write_text(json.dumps({"expected": expected, "counts": [4]}))
    result = submit("acdc", predictions, "--out", out, "-d", 27, "--rules", rules)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert "file_name = " in result.stderr and "third party" in result.stderr and "labels = " not in result.stderr
    members = [member.filename for member in unpack(out, tmp_path / "u")]
    assert members == [f"patient{n}_{phase}.nii.gz" for n in (101, 117) for phase in ("ED", "ES")]
    for number, frames in ((101, (second, first)), (117, acdc_frames(117))):
        for phase, frame in zip(("ED", "ES"), frames, strict=True):
            case, submitted = f"patient{number}_frame{frame:02d}", tmp_path / "u" / f"patient{number}_{phase}.nii.gz"
            assert np.array_equal(volume(submitted)[0], volume(predictions / f"{case}.nii.gz")[0])
            same_place(submitted, source / "testing" / f"patient{number}" / f"{case}.nii.gz")

    # The same from the download itself, whose Info.cfg names the frames, to the last byte.
    again = tmp_path / "again.zip"
    assert submit("acdc", predictions, "--out", again, "--images", source / "testing", "--rules", rules).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    (dataset / "frames.json").unlink()
    with pytest.raises(DataError, match=r"Info\.cfg"):
        inspect("acdc", predictions, images=dataset / "imagesTs")


def test_amos(tmp_path: Path) -> None:
    source = build_amos(tmp_path, (1, 2), (8, 9, 510), (3,))
    images, rules = tmp_path / "images", tmp_path / "rules.json"
    images.mkdir()
    for path in source.glob("imagesVa/[!.]*"):
        shutil.copy(path, images / path.name.replace(".nii", "_0000.nii"))
    # Its model's values are in another order, and its names in another spelling.
    names = [name.replace("gall bladder", "Gallbladder").replace(" ", "_") for name in AMOS_LABELS]
    labels = {"background": 0} | {name: 16 - value for value, name in enumerate(names) if value}
    predictions, out = tmp_path / "predictions", tmp_path / "amos.zip"
    predict(images, predictions, labels, NibabelIOWithReorient())
    rules.write_text('{"counts": [3]}')
    result = submit("amos", predictions, "--out", out, "--images", source / "imagesVa", "--rules", rules)
    assert result.exit_code == 0, result.output
    members = [member.filename for member in unpack(out, tmp_path / "u")]
    assert members == [f"results/amos_{n:04d}.nii.gz" for n in (8, 9, 510)]
    for name in members:
        submitted, predicted = volume(tmp_path / "u" / name)[0], volume(predictions / Path(name).name)[0]
        assert np.array_equal(submitted, np.where(predicted == 0, 0, 16 - predicted.astype(int)))
        same_place(tmp_path / "u" / name, source / "imagesVa" / Path(name).name)
    (predictions / "amos_0008.nii.gz").unlink()
    missing, count = inspect("amos", predictions, images=source / "imagesVa").defects
    assert missing.startswith("amos_0008.nii.gz") and "100 or 120" in count
    (predictions / "amos_0510.nii.gz").unlink()  # the only MR: task 1 takes CT alone
    assert inspect("amos", predictions, images=source / "imagesVa").defects[0] == missing
    assert len(inspect("amos", predictions, images=source / "imagesVa").defects) == 2


def test_synapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8 organs of TransUNet among the challenge's 13."""
    nnunet_folders(tmp_path, monkeypatch)
    source = build_synapse(tmp_path)
    dataset = convert("synapse", source, 17, organs=8, split="none")
    predictions, out = tmp_path / "predictions", tmp_path / "synapse.zip"
    predict(dataset / "imagesTs", predictions, json.loads((dataset / "dataset.json").read_text())["labels"])
    (predictions / "dataset.json").unlink()  # that of the raw dataset will do

    result = submit("synapse", predictions, "--out", out, "-d", "Dataset017_Synapse8")
    assert result.exit_code == 0, result.output
    assert "esophagus (5), inferior vena cava (9)" in result.stderr
    members = [member.filename for member in unpack(out, tmp_path / "u")]
    assert members == [f"label{n:04d}.nii.gz" for n in range(61, 81)]
    for number in (61, 80):
        submitted = volume(tmp_path / "u" / f"label{number:04d}.nii.gz")[0]
        predicted = volume(predictions / f"img{number:04d}.nii.gz")[0]
        for value, organ in enumerate(ORGANS_8, start=1):
            assert np.array_equal(submitted == ORGANS_13.index(organ) + 1, predicted == value), organ
        same_place(tmp_path / "u" / f"label{number:04d}.nii.gz", source / "Test" / "img" / f"img{number:04d}.nii.gz")
    (predictions / "img0061.nii.gz").rename(predictions / "img0001.nii.gz")  # a training case
    named = [defect.split(":")[0] for defect in inspect("synapse", predictions, dataset="17").defects]
    assert named == ["img0001.nii.gz", "label0061.nii.gz"]


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
    swapped = {"background": 0, "Cancer": 1, "liver": 2}
    predictions = msd_task(tmp_path, "Task03_Liver", ["liver_140", "liver_141", "liver_9"], swapped)
    out = tmp_path / "msd.zip"
    result = submit("msd", predictions, "--out", out, "--images", tmp_path / "download")
    assert result.exit_code == 0, result.output
    assert "liver_141" in result.stderr
    members = [member.filename for member in unpack(out, tmp_path / "u")]
    named = [("Task01_BrainTumour", ("BRATS_485", "BRATS_486")), ("Task03_Liver", ("liver_140", "liver_9"))]
    assert members == [f"{task}/{case}.nii.gz" for task, cases in named for case in cases]
    submitted, predicted = volume(tmp_path / "u" / members[2])[0], volume(predictions / members[2])[0]
    assert np.array_equal(submitted == 1, predicted == 2) and np.array_equal(submitted == 2, predicted == 1)
    for name in members:
        task, file = name.split("/")
        same_place(tmp_path / "u" / name, tmp_path / "download" / task / "imagesTs" / file)
    rules = tmp_path / "rules.json"
    rules.write_text('{"all_tasks": true, "tasks": {"Task03_Liver": {"left_out": []}}}')
    found = inspect("msd", predictions, override=rules)
    (defect,) = found.defects
    assert len(found.files) == 5 and "8 of 10" in defect
    (predictions / "Task03_Liver" / "liver_140.nii.gz").unlink()
    found = inspect("msd", predictions, images=tmp_path / "download")
    assert [defect.split(":")[0] for defect in found.defects] == ["Task03_Liver/liver_140.nii.gz"]
    assert inspect("msd", predictions / "Task03_Liver", task="Task09_Spleen").defects
    with pytest.raises(UsageError, match="--task Spleen"):
        inspect("msd", predictions, task="Spleen")
    (predictions / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"notes\.txt"):
        inspect("msd", predictions)


# --- every defect -----------------------------------------------------------------------------------------------------

SPLEEN = {"background": 0, "spleen": 1}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "root"
    msd_task(root, "Task09_Spleen", [f"spleen_{n}" for n in (1, 4, 11, 15)], SPLEEN)
    return root


@pytest.fixture
def spleens(sound: Path, tmp_path: Path) -> Path:
    """A decathlon's task: sound predictions of four images, which lie beside them."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path / "predictions" / "Task09_Spleen"


def describe(predictions: Path, labels: object) -> None:
    (predictions / "dataset.json").write_text(json.dumps({"labels": labels}))


def images_of(predictions: Path) -> Path:
    return predictions.parents[1] / "download" / "Task09_Spleen"


def image_of(prediction: Path) -> Path:
    return images_of(prediction.parent) / "imagesTs" / prediction.name


def checked(predictions: Path, **options: Any) -> Inspection:
    return inspect("msd", predictions, **({"images": images_of(predictions)} | options))


def submitted(predictions: Path, folder: Path) -> Path:
    """Package sound predictions, and unpack the archive's folder."""
    found = checked(predictions)
    assert found.defects == ()
    package(found, folder / "out.zip")
    unpack(folder / "out.zip", folder / "u")
    return folder / "u" / "Task09_Spleen"


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


def scaled_to_probabilities(path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((5, 6, 7), np.int16), np.diag([3, 1.5, 2, 1]))
    image.header.set_slope_inter(0.005, 0)
    nibabel.save(image, path)


def moved(path: Path) -> None:
    affine = nibabel.load(path).affine.copy()
    affine[0, 3] += 5
    rewrite(path, lambda values: values, affine)


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to spleen_11, what the defect holds
    "missing case": (lambda p: p.unlink(), "spleen_11.nii.gz: "),
    "stray file": (lambda p: (p.parent / "notes.txt").touch(), "notes.txt: "),
    "stray case": (lambda p: shutil.copy(p, p.with_name("spleen_99.nii.gz")), "spleen_99.nii.gz: "),
    "foreign name": (lambda p: shutil.copy(p, p.with_name("liver_11.nii.gz")), "liver_11.nii.gz: "),
    "wrong label": (with_value(2, np.uint8), "spleen_11.nii.gz: holds the labels 2"),
    "nearly whole": (with_value(0.999), "spleen_11.nii.gz: .* 1 voxels .*0.999"),
    "NaN": (with_value(np.nan), "spleen_11.nii.gz: .* 1 voxels .*nan"),
    "other shape": (lambda p: rewrite(p, lambda v: v[:, :-1]), r"spleen_11.nii.gz: shape .*5.*6"),
    "other origin": (moved, "spleen_11.nii.gz: origin .*5.0"),
    "other direction": (
        lambda p: rewrite(p, lambda v: v, np.diag([3, -1.5, 2, 1])), "spleen_11.nii.gz: direction"
    ),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "spleen_11.nii.gz: cannot be read"),
    "another format": (
        lambda p: p.with_suffix("").write_bytes(gzip.decompress(p.read_bytes())), "spleen_11.nii: "
    ),
    "dangling link": (lambda p: (p.unlink(), p.symlink_to("nowhere")), "spleen_11.nii.gz: is a link to"),
    "dangling link to an image": (
        lambda p: (image_of(p).unlink(), image_of(p).symlink_to("nowhere")),
        "spleen_11.nii.gz: cannot be compared .*imagesTs/spleen_11.nii.gz.*FileNotFound",
    ),
    "probabilities in a scaled file": (
        scaled_to_probabilities, "spleen_11.nii.gz: .* 210 voxels .*0.005"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_is_named_and_nothing_written(spleens: Path, tmp_path: Path, kind: str) -> None:
    spoil, named = DEFECTS[kind]
    spoil(spleens / "spleen_11.nii.gz")
    out, before = tmp_path / "out" / "spleen.zip", files(spleens)
    result = submit("msd", spleens, "--images", images_of(spleens), "--out", out)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit) and result.stdout == ""
    (defect,) = defects_in(result.stderr)
    assert re.match(named, defect), defect
    assert not out.parent.exists() and files(spleens) == before


def defects_in(text: str) -> list[str]:
    """The lines of an error below its first one."""
    return [line.strip() for line in text[text.index("error: ") :].splitlines()[1:]]


def test_all_defects_at_once(spleens: Path) -> None:
    with_value(7, np.uint8)(spleens / "spleen_1.nii.gz")
    (spleens / "spleen_11.nii.gz").unlink()
    (spleens / "README").touch()
    describe(spleens, {"background": 0, "spleen": 1, "liver": 2})
    result = submit("msd", spleens, "--check", "--images", images_of(spleens))
    assert result.exit_code == 1 and "defects: 4" in result.stderr
    named = ["label", "README:", "spleen_11.nii.gz:", "spleen_1.nii.gz:"]
    assert [line.split(" ")[0] for line in defects_in(result.stderr)] == named


def test_a_sound_folder_and_what_is_passed_over(spleens: Path) -> None:
    for name in ("spleen_11.npz", "spleen_11.pkl", "summary.json", ".DS_Store", "._spleen_11.nii.gz"):
        (spleens / name).touch()
    before = files(spleens.parents[1])
    result = submit("msd", spleens, "--check", "--images", images_of(spleens))
    assert result.exit_code == 0 and "4 files" in result.stdout and "2 files of probabilities" in result.stderr
    assert files(spleens.parents[1]) == before


def test_whole_numbers_of_other_types_are_cast(spleens: Path, tmp_path: Path) -> None:
    rewrite(spleens / "spleen_1.nii.gz", lambda values: values.astype(np.float64))
    rewrite(spleens / "spleen_4.nii.gz", lambda values: values.astype(np.int32))
    stored = np.asanyarray(nibabel.load(spleens / "spleen_11.nii.gz").dataobj).astype(np.int16) * 3000
    scaled = nibabel.Nifti1Image(stored, np.diag([3, 1.5, 2, 1]))
    scaled.header.set_slope_inter(1 / 3000, 0)  # 0.99999994
    nibabel.save(scaled, spleens / "spleen_11.nii.gz")
    rewrite(spleens / "spleen_15.nii.gz", np.zeros_like)
    assert volume(spleens / "spleen_11.nii.gz")[0].dtype == np.float64
    assert any("spleen_15.nii.gz" in note for note in checked(spleens).notes)  # background only
    for case in ("spleen_1", "spleen_4", "spleen_11"):
        voxels = volume(submitted(spleens, tmp_path) / f"{case}.nii.gz")[0]
        assert voxels.dtype == np.uint8
        assert np.array_equal(voxels, np.rint(volume(spleens / f"{case}.nii.gz")[0]))


def test_either_placement_of_a_header_will_do(spleens: Path, tmp_path: Path) -> None:
    """An image with two placements: nnU-Net's prediction repeats the one that its reader took."""
    path = image_of(spleens / "spleen_11.nii.gz")
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
        same_place(submitted(spleens, tmp_path) / "spleen_11.nii.gz", path)


def test_texts_of_the_images_headers_stay_here(spleens: Path, tmp_path: Path) -> None:
    path = image_of(spleens / "spleen_11.nii.gz")
    image = nibabel.load(path)
    image.header["descrip"] = b"Jane Doe"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nibabel.save(image, path)
    content = gzip.decompress((submitted(spleens, tmp_path) / "spleen_11.nii.gz").read_bytes())
    assert b"Jane" in gzip.decompress(path.read_bytes()) and b"Jane" not in content


# --- labels by name ---------------------------------------------------------------------------------------------------


def test_labels_that_do_not_match(spleens: Path, tmp_path: Path) -> None:
    describe(spleens, {"background": 0, "Milz": 1})
    unknown, lacking = checked(spleens).defects
    assert "'Milz' (1)" in unknown and "spleen (1)" in lacking
    rules = tmp_path / "rules.json"
    rules.write_text('{"also_called": {"spleen": ["milz"]}}')
    assert checked(spleens, override=rules).defects == ()
    describe(spleens, {"background": 0, "spleen": 1, "Spleen": 2})
    (twice,) = checked(spleens).defects
    assert "'spleen', 'Spleen'" in twice
    describe(spleens, {"background": 0, "spleen": 1, "ignore": 2})
    assert checked(spleens).defects == ()
    with_value(2, np.uint8)(spleens / "spleen_4.nii.gz")
    (ignored,) = checked(spleens).defects
    assert ignored.startswith("spleen_4.nii.gz: holds the labels 2")


def test_other_descriptions_and_no_images(spleens: Path, tmp_path: Path) -> None:
    for labels in ({"background": 0, "organ": [1, 2]}, {"background": 0, "spleen": "1"}, []):
        describe(spleens, labels)
        with pytest.raises(DataError, match="--dataset-json"):
            checked(spleens)
    (tmp_path / "other.json").write_text(json.dumps({"labels": SPLEEN}))
    assert checked(spleens, dataset_json=tmp_path / "other.json").defects == ()
    (spleens / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json.*--dataset-json"):
        checked(spleens)
    describe(spleens, SPLEEN)
    moved(spleens / "spleen_11.nii.gz")
    found = checked(spleens, images=None)
    assert found.defects == () and any("--images" in note and "missing cases" in note for note in found.notes)


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHALLENGES)
def test_every_unconfirmed_rule_has_its_source(name: str) -> None:
    assert name in tuple(Challenge)
    challenge = load_rules(name)
    assert {rule.name for rule in challenge.unconfirmed} >= {"dtype"}
    assert all(rule.source for rule in challenge.unconfirmed)
    for task, rules in challenge.tasks.items():
        assert sorted(rules.labels.values()) == list(range(len(rules.labels)))
        assert task or set(rules.also_called) <= set(rules.labels)


def test_own_rules(spleens: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    tasks = {"Task09_Spleen": {"labels": {"background": 0, "spleen": 300}, "counts": [4]}}
    own = {"folder": "submission/{task}", "file_name": "seg_{case}.nii.gz", "dtype": "int16", "tasks": tasks}
    rules.write_text(json.dumps(own))
    out = tmp_path / "out.zip"
    result = submit("msd", spleens, "--out", out, "--images", images_of(spleens), "--rules", rules)
    assert result.exit_code == 0, result.output
    assert "all_tasks = " in result.stderr
    assert not any(f" {rule} = " in result.stderr for rule in own)
    names = [member.filename for member in unpack(out, tmp_path / "u")]
    assert names[0] == "submission/Task09_Spleen/seg_spleen_1.nii.gz" and len(names) == 4
    voxels = volume(tmp_path / "u" / names[0])[0]
    assert voxels.dtype == np.int16 and set(np.unique(voxels)) == {0, 300}
    (spleens / "spleen_15.nii.gz").unlink()
    assert any("exactly 4" in defect for defect in checked(spleens, override=rules).defects)
    assert load_rules("msd", rules).tasks["Task03_Liver"].labels["cancer"] == 2  # the others as they were


@pytest.mark.parametrize(
    ("challenge", "content", "named"),
    [
        ("amos", "{", "JSON|double quotes"),
        ("amos", '["folder"]', "sequence"),
        ("amos", '{"folders": "x"}', "folders"),
        ("amos", '{"tasks": {}}', "tasks"),
        ("amos", '{"folder": "../x"}', r"folder = '\.\./x'"),
        ("amos", '{"file_name": "{id}.nii.gz"}', "file_name .*'id'"),
        ("amos", '{"labels": {"background": 0, "a": 1, "b": 1}}', "labels .*'b': 1"),
        ("amos", '{"labels": {"background": 0, "a": 256}}', "256.*uint8"),
        ("amos", '{"expected": {"case": ["a"]}}', r"expected .*'case'.*'number'"),
        ("msd", '{"tasks": {"Task11_New": {"case": "x"}}}', "Task11_New labels"),
        ("msd", '{"tasks": ["Task11_New"]}', "list"),
    ],
)
def test_rules_that_do_not_fit_are_named(tmp_path: Path, challenge: str, content: str, named: str) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(content)
    with pytest.raises(UsageError, match=rf"--rules {rules}.*({named})"):
        load_rules(challenge, rules)


# --- the archive ------------------------------------------------------------------------------------------------------


def test_the_same_input_makes_the_same_archive(spleens: Path, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        package(checked(spleens), tmp_path / name)
        for path in spleens.iterdir():
            os.utime(path, (1, 1))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {m.external_attr >> 16 for m in archive.infolist()} == {0o644}


def test_places_where_nothing_is_put(spleens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    out.write_bytes(b"earlier")
    for target in (out, tmp_path / "out.tar", spleens / "out.zip"):
        result = submit("msd", spleens, "--out", target, "--images", images_of(spleens))
        assert result.exit_code == 1 and f"--out {target}" in result.stderr
    (tmp_path / "folder.zip").mkdir()
    assert submit("msd", spleens, "--out", tmp_path / "folder.zip").exit_code == 1
    assert out.read_bytes() == b"earlier"
    assert submit("msd", spleens, "--out", out, "--images", images_of(spleens), "--force").exit_code == 0
    assert zipfile.is_zipfile(out)
    assert submit("msd", spleens).exit_code == 2
    for options, option in (
        ({"predictions": tmp_path / "none"}, "PREDICTIONS"),
        ({"images": tmp_path / "none"}, "--images"),
        ({"images": tmp_path / "folder.zip"}, "--images"),
    ):
        with pytest.raises(UsageError, match=option):
            inspect("msd", **({"predictions": spleens, "task": "Task09_Spleen"} | options))


def test_what_cannot_be_written_or_has_changed_leaves_what_was_there(
    spleens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = checked(spleens), tmp_path / "out" / "out.zip"
    out.parent.mkdir()
    out.write_bytes(b"earlier")

    def full(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
        if "spleen_15" in entry.filename:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writestr(archive, entry, content)

    def damaged(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
        writestr(archive, entry, content)
        archive.getinfo(entry.filename).CRC ^= 1

    writestr = zipfile.ZipFile.writestr
    for write, kind, named in ((full, UsageError, str(out)), (damaged, DataError, "spleen_1.nii.gz")):
        with monkeypatch.context() as patched, pytest.raises(kind, match=named):
            patched.setattr(zipfile.ZipFile, "writestr", write)
            package(found, out)
    with_value(9, np.uint8)(spleens / "spleen_15.nii.gz")  # after the check
    with pytest.raises(DataError, match="spleen_15"):
        package(found, out)
    assert [path.name for path in out.parent.iterdir()] == ["out.zip"] and out.read_bytes() == b"earlier"
