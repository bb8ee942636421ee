"""``masksam explain`` on models written by hand: what a made-up network says is what page and files say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from configs import tiny_config, with_equal_shares
from kinds_of_data import OBLIQUE
from made_up_models import add_fold
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from plain_plans import DATASET, dataset_json, folders, plain_plans, region_dataset_json, tiny_plans
from typer.testing import CliRunner, Result

from masksam_nnunet.cli import app as cli
from masksam_nnunet.config import Grid
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.inference.explain.run import draw_preprocessed
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.network import MaskSAMOutput
from masksam_nnunet.trainers import MaskSAMTrainer

TRAINER = "MaskSAMTrainer_tiny"
PATCH = (4, 32, 32)
BOX = (0.25, 0.125, 0.5, 0.375)
SIZE = (9, 44, 40)  # of the source's array, (z, y, x)
EDGE = 3  # zeros around what nnU-Net keeps, in every axis but the last


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take most of the time."""
    monkeypatch.setattr("masksam_nnunet.inference.explain.run.draw_overview", lambda *_: b"")
    monkeypatch.setattr("masksam_nnunet.inference.explain.run.draw_queries", lambda *_: (b"", ""))


def write_model(
    root: Path, plans: dict[str, Any], description: dict[str, Any], configuration: str = "3d_fullres", folds: int = 1
) -> Path:
    """A model of random weights, whose folds differ."""
    model = root / "nnUNet_results" / DATASET / f"{TRAINER}__nnUNetPlans__{configuration}"
    model.mkdir(parents=True)
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    network = with_equal_shares(
        MaskSAMTrainer.build_network_architecture(
            manager,
            settings,
            determine_num_input_channels(manager, settings, description),
            manager.get_label_manager(description).num_segmentation_heads,
        )
    )
    for fold in range(folds):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        add_fold(model, fold, network, TRAINER, configuration)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(description))
    return model


def plans_with(patch: tuple[int, ...] = PATCH, **form: Any) -> dict[str, Any]:
    plans = tiny_plans(patch, form)
    plans.update(foreground_intensity_properties_per_channel={"0": {}})
    return plans


def made_up_image() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An image of 10, with an organ of 100 and one of 50, zeros at its edges; and where the organs are."""
    image, labels = np.full(SIZE, 10, np.float32), np.zeros(SIZE, np.uint8)
    labels[2:7, 10:22, 8:30] = 1
    labels[3:6, 26:34, 12:20] = 2
    image[labels == 1], image[labels == 2] = 100, 50
    image[:, :EDGE], image[:, -EDGE:], image[0] = 0, 0, 0
    return image, labels


def write(file: Path, array: NDArray[Any], shift: float = 0.0) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetOrigin((-17.5 + shift, 3.25, 120.0))
    image.SetDirection(OBLIQUE)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def write_case(root: Path, labelled: bool = True) -> Path:
    raw = root / "nnUNet_raw" / DATASET
    image, labels = made_up_image()
    if labelled:
        write(raw / "labelsTr" / "case_1.nii.gz", labels)
    return write(raw / "imagesTr" / "case_1_0000.nii.gz", image)


def explain(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["explain", "-d", "42", "-c", "3d_fullres", "-tr", TRAINER, *map(str, words)])


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "explain.json").read_text())
    return content


def made_up_parts(network: MaskSAM, x: torch.Tensor) -> MaskSAMOutput:
    """Query 3 is sure of the first organ and finds what is bright, query 5 of the second one; 14 others are idle."""
    batch, number, size = len(x), network.num_queries, x.shape[2:]
    classes = torch.zeros(batch, size[0], number, network.num_classes + 1)
    classes[..., -1] = 12.0
    masks = torch.full((batch, size[0], number, *size[1:]), -12.0)
    for query, head in ((2, 1), (4, 2)):
        classes[:, :, query, head], classes[:, :, query, -1] = 12.0, 0.0
    bright, middle = x[:, 0] > 1.5, (x[:, 0] > 0.5) & (x[:, 0] < 1.5)
    masks[:, :, 2][bright], masks[:, :, 4][middle] = 12.0, 12.0
    drafts = torch.full((batch, size[0], number, *network.grid.masks), -9.0)
    drafts[:, :, 4] = 9.0
    boxes = torch.tensor(BOX).expand(batch, size[0], number, 4)
    return MaskSAMOutput(classes, masks, drafts, boxes)


def test_page_pictures_and_overlays_say_what_the_network_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes, patch, slices = [2, 0, 1], (32, 8, 32), (15, 18)
    plans = plans_with(patch, matching="slice", num_queries=16)
    plans |= {"transpose_forward": axes, "transpose_backward": [1, 2, 0]}
    write_model(tmp_path, plans, dataset_json())
    source = write_case(tmp_path)
    image, labels = made_up_image()
    monkeypatch.setattr(MaskSAM, "outputs", made_up_parts)
    result = explain("-f", 0, "case_1", "--slices", *slices, "--out", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "out/explain.html"
    out, facts = tmp_path / "out", record(tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {*facts["files"], "explain.json"}

    # The result is the two organs; each voxel is owed to its query; the network is sure everywhere.
    read = {name: sitk.ReadImage(str(out / f"{name}.nii.gz")) for name in ("segmentation", "queries", "uncertainty")}
    arrays = {name: sitk.GetArrayFromImage(volume) for name, volume in read.items()}
    np.testing.assert_array_equal(arrays["segmentation"], labels)
    np.testing.assert_array_equal(arrays["queries"], np.choose(labels, [0, 3, 5]))
    assert arrays["uncertainty"].dtype == np.float32 and 0 <= arrays["uncertainty"].max() < 0.01
    assert arrays["segmentation"].dtype == arrays["queries"].dtype == np.uint8
    theirs = sitk.ReadImage(str(source))
    for name, volume in read.items():
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            # A NIfTI header holds directions as a quaternion of 32-bit numbers.
            np.testing.assert_allclose(getattr(volume, geometry)(), getattr(theirs, geometry)(), atol=1e-6)
        ours = nibabel.load(out / f"{name}.nii.gz").affine
        np.testing.assert_allclose(ours, nibabel.load(source).affine, atol=1e-5)

    # Numbers in source slices; boxes on the network's grid.
    assert [item["source"] for item in facts["slices"]] == list(slices)
    assert facts["slice_axis"] == "i"
    kept = np.argwhere(image.transpose(axes)).min(0)  # what nnU-Net cuts off before
    padded = Grid.of(tiny_config(patch_size=patch)).padded  # boxes are shares of this plane
    for item in facts["slices"]:
        there = labels.transpose(axes)[item["source"]]
        assert item["network"] == item["source"] - kept[0] and item["foreground"] == np.count_nonzero(there)
        by_number = {query["number"]: query for query in item["queries"]}
        assert len(by_number) == 16 and sum(query["shown"] for query in by_number.values()) == 12
        expected = np.array(BOX) * np.array([padded[1], padded[0]] * 2)
        expected += np.array(item["corner"])[[2, 1, 2, 1]]
        for number, organ in ((3, 1), (5, 2)):
            query = by_number[number]
            assert query["class_name"] == f"organ {organ}" and query["kept"] and query["probability"] > 0.999
            np.testing.assert_allclose(query["box"], expected, atol=1e-4)
            window = [slice(max(c, 0), c + n) for c, n in zip(item["corner"][1:], patch[1:], strict=True)]
            inside = there[tuple(slice(s.start + k, s.stop + k) for s, k in zip(window, kept[1:], strict=True))]
            assert query["mask_pixels"] == np.count_nonzero(inside == organ)
            assert query["draft_pixels"] == (0 if number == 3 else inside.size)
            if query["mask_pixels"]:
                assert query["label_iou"] == 1.0
        assert all(not query["kept"] for number, query in by_number.items() if number not in (3, 5))

    # The page shows all of it and fetches nothing.
    html = (out / "explain.html").read_text()
    fetched = re.findall(r'(?:src|href)="([^"]*)', html)
    assert len(fetched) == 4 and all(link.startswith("data:image/png;base64,") for link in fetched)
    assert not re.search(r"https?://|@import|url\(|<script", html)
    assert "12 of 16 queries" in html and all(f"Slice {index}" in html for index in slices)
    assert html.count('<th scope="row"') == 32  # queries


@pytest.mark.usefixtures("_undrawn")
def test_the_result_is_nnunets_and_folds_disagree(tmp_path: Path) -> None:
    model = write_model(tmp_path, plans_with(), dataset_json(), folds=2)
    source = write_case(tmp_path, labelled=False)
    result = explain("-f", 0, 1, "case_1")
    assert result.exit_code == 0, result.output
    out = tmp_path / "explain_case_1"
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0, 1))
    predictor.predict_from_files_sequential([[str(source)]], [str(tmp_path / "stock")])
    expected, received = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        for file in (tmp_path / "stock.nii.gz", out / "segmentation.nii.gz")
    )
    assert len(np.unique(expected)) > 1, "a prediction of one class shows nothing"
    np.testing.assert_array_equal(received, expected)
    entropy, disagreement = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}.nii.gz"))) for name in ("uncertainty", "disagreement")
    )
    assert entropy.max() > 0.1 and disagreement.max() > 0.001 and (disagreement <= entropy + 1e-4).all()
    assert disagreement.min() >= 0 and not entropy[0].any()  # nnU-Net cuts it off
    facts = record(out)
    assert facts["folds"] == ["0", "1"] and facts["label"] is None and len(facts["slices"]) == 4
    assert facts["num_queries"] == (out / "queries.label").read_text().count('"query ') == 3
    assert "IoU with label" not in (out / "explain.html").read_text()


@pytest.mark.usefixtures("_undrawn")
def test_regions_an_ignore_label_two_dimensions_and_given_files(tmp_path: Path) -> None:
    model = write_model(tmp_path, plans_with(regions=True), region_dataset_json(ignore=True))
    image, labels = made_up_image()
    labels[6:] = 4  # ignored
    files = write(tmp_path / "some where" / "Ünknown.nii.gz", image), write(tmp_path / "truth.nii.gz", labels)
    result = explain("--image", files[0], "--label", files[1], "--slices", 4, "--disable_tta", "--device", "cpu")
    assert result.exit_code == 0, result.output
    out = tmp_path / "explain_Ünknown"
    facts = record(out)
    assert facts["regions"] and facts["seen"] is None and not facts["mirrored"] and facts["label"] == "truth.nii.gz"
    names = re.findall(r'^ +(\d+).*"(.*)"$', (out / "segmentation.label").read_text(), re.MULTILINE)
    assert names == [("0", "Clear Label"), ("1", "whole"), ("2", "core")] and facts["ignored"]
    assert {query["class_name"] for query in facts["slices"][0]["queries"]} <= {"whole", "core"}

    model.rename(model.with_name("other"))
    write_model(tmp_path, plans_with((32, 32)), dataset_json())
    result = explain("--image", files[0], "--slices", 4, "-o", "flat", "--disable_tta")
    assert result.exit_code == 0, result.output
    facts = record(tmp_path / "flat")
    (item,) = facts["slices"]
    assert item["size"] == [1, 32, 32] and item["off_centre"] == 0 and item["corner"][0] == item["network"] == 3
    # The slices that are not all zero, and in each two windows by two.
    assert facts["windows"] == 8 * 4


@pytest.mark.usefixtures("_undrawn")
def test_the_second_stage_of_a_cascade_needs_the_first_ones_labels(tmp_path: Path) -> None:
    plans = plans_with()
    configurations = plans["configurations"]
    configurations["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    write_model(tmp_path, plans, dataset_json(), "3d_cascade_fullres")
    write_case(tmp_path)
    cascade = ("-c", "3d_cascade_fullres", "case_1", "--slices", 4, "--disable_tta", "-o", "out")
    for words in ((), ("-prev_stage_predictions", tmp_path)):
        result = explain(*cascade, *words)
        assert result.exit_code == 1 and re.search("(?s)-prev_stage_predictions.*3d_lowres", result.stderr)
    result = explain(*cascade, "-prev_stage_predictions", tmp_path / "nnUNet_raw" / DATASET / "labelsTr")
    assert result.exit_code == 0, result.output
    assert record(tmp_path / "out")["configuration"] == "3d_cascade_fullres"


def test_queries_of_a_preprocessed_case_are_drawn(tmp_path: Path) -> None:
    """For the benchmark's report."""
    model = write_model(tmp_path, plans_with(), dataset_json())
    image, labels = made_up_image()
    preprocessed = tmp_path / "nnUNet_preprocessed" / DATASET
    place = str(preprocessed / "hand_data" / "case_1")
    nnUNetDatasetBlosc2.save_case(image[None], labels[None].astype(np.int16), {}, place)
    pictures = draw_preprocessed(model, 0, preprocessed, "case_1")
    assert [picture.title.split()[1] for picture in pictures] == ["3", "5"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)


def test_errors_name_the_option_and_leave_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path, plans_with(), dataset_json())
    write_case(tmp_path)
    image, labels = made_up_image()
    shifted = write(tmp_path / "shifted.nii.gz", labels, shift=5.0)
    strange = write(tmp_path / "strange.nii.gz", labels + 7)
    torn = tmp_path / "torn.nii.gz"
    torn.write_bytes(write(tmp_path / "whole.nii.gz", image).read_bytes()[:500])
    stock = model.with_name("nnUNetTrainer__nnUNetPlans__3d_fullres")
    shutil.copytree(model, stock)
    (stock / "plans.json").write_text(json.dumps(plain_plans(PATCH)))
    begun = model.with_name("MaskSAMTrainer__nnUNetPlans__3d_fullres")
    begun.mkdir()
    for name in ("plans.json", "dataset.json"):
        shutil.copy(stock / name, begun)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    before = sorted(tmp_path.iterdir())
    table = [  # the command's words, and what the error names
        ("case_2", "'case_2'.*case_1"),
        ("", "CASE"),
        ("case_1 -tr nnUNetTrainer", f"PlainConvUNet.*-tr.*{model.name}"),
        ("case_1 -tr MaskSAMTrainer", "checkpoint_final.pth of fold 0"),
        ("case_1 -f 0 3", "-f .*3"),
        ("case_1 -chk checkpoint_best.pth", "checkpoint_best.pth"),
        ("case_1 --slices 4 40", "--slices 40: "),
        ("case_1 --device tpu:x", "--device tpu:x"),
        (f"case_1 --out {full}", f"--out {full}.*mine.txt"),
        (f"case_1 --out {torn}", f"--out {torn}"),
        (f"case_1 --label {shifted}", f"{shifted}.*origin"),
        (f"case_1 --label {strange}", f"{strange}.*7, 8, 9"),
        (f"case_1 --label {model / 'plans.json'}", "--label .*'.nii.gz'"),
        (f"new --image {torn}", f"{torn}"),
    ]
    for words, named in table:
        result = explain(*words.split())
        assert result.exit_code == 1 and re.search(named, " ".join(result.stderr.split())), (words, result.output)
        assert "Traceback" not in result.output and not result.stdout
        assert sorted(tmp_path.iterdir()) == before, words
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    result = explain("case_1")
    assert result.exit_code == 1 and "checkpoint_final.pth" in result.stderr
