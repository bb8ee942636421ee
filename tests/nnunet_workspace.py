"""nnU-Net's folders and commands, for integration tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from commands import prepared

from masksam_nnunet.environment import trainer_folder

# Real volumes: a folder of nnU-Net raw datasets, or one beside the checkout; phantoms where there is none.
SHARED = Path(os.environ.get("MASKSAM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
BOX = (24, 32, 16)  # x y z
SHORT_TRAINERS = Path(__file__).parent / "integration" / "short_trainers"


@dataclass
class Workspace:
    """nnU-Net's three folders, and its commands."""

    root: Path
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.raw, self.preprocessed, self.results = (
            self.root / f"nnUNet_{n}" for n in ("raw", "preprocessed", "results")
        )

    @property
    def environment(self) -> dict[str, str]:
        """That of a command: nothing of the caller's own nnU-Net."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MASKSAM_", "nnUNet_"))},
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": os.pathsep.join([str(trainer_folder()), str(SHORT_TRAINERS)]),
            "nnUNet_def_n_proc": "1",
            **self.extra,
        }

    def run(self, *words: object, fails: bool = False, **env: str) -> str:
        """Run one of the environment's commands; its output. Asserts that it works, or that it fails."""
        log = self.root / "log.txt"
        log.unlink(missing_ok=True)
        # 0 is right for training without workers, but makes planning fail.
        workers = {"nnUNet_n_proc_DA": "0"} if "nnUNetv2_train" in words or words[:2] == ("masksam", "train") else {}
        status = prepared().start(words, log, self.environment | workers | env).wait()
        output = log.read_text()
        assert (status != 0) == fails, f"{words} exited with {status}:\n{output[-6000:]}"
        return output

    def run_all(self, *commands: Sequence[object], **env: str) -> str:
        """Run several commands one after another; their output. Asserts that all work."""
        return "".join(f"$ {' '.join(map(str, words))}\n{self.run(*words, **env)}" for words in commands)

    def model(self, dataset: str, trainer: str, plans: str = "nnUNetPlans") -> Path:
        return self.results / dataset / f"{trainer}__{plans}__3d_fullres"

    def set_batch_size(self, dataset: str, batch_size: int) -> None:
        """nnU-Net plans large batches for images this small."""
        file = self.preprocessed / dataset / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"]["batch_size"] = batch_size
        file.write_text(json.dumps(plans))

    @contextmanager
    def plans(self, dataset: str, **changes: object) -> Iterator[None]:
        """The 3d_fullres configuration with other values, for a while."""
        file = self.preprocessed / dataset / "nnUNetPlans.json"
        before = file.read_text()
        plans = json.loads(before)
        plans["configurations"]["3d_fullres"].update(changes)
        file.write_text(json.dumps(plans))
        try:
            yield
        finally:
            file.write_text(before)


@dataclass
class Dataset:
    name: str
    id: int
    num_classes: int
    cases: list[str]


def copy_small(source: Path, target: Path, cases: int) -> list[str]:
    """The first cases of a raw dataset with two organs, cut to a box around their labels that is one window."""
    names = sorted(p.name.removesuffix(".nii.gz") for p in (source / "labelsTr").glob("*.nii.gz"))[:cases]
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for name in names:
        labels = sitk.ReadImage(str(source / "labelsTr" / f"{name}.nii.gz"))
        image = sitk.ReadImage(str(source / "imagesTr" / f"{name}_0000.nii.gz"))
        box = _box(labels)
        organs = sitk.Cast(sitk.Clamp(labels, upperBound=2), sitk.sitkUInt8)
        for picture, file in ((organs, f"labelsTr/{name}"), (image, f"imagesTr/{name}_0000")):
            cut = picture[box]
            cut.SetSpacing((1.0, 1.0, 1.0))  # the phantoms' varies
            sitk.WriteImage(cut, str(target / f"{file}.nii.gz"))
    description = json.loads((source / "dataset.json").read_text())
    description |= {"numTraining": len(names), "labels": {"background": 0, "first": 1, "second": 2}}
    (target / "dataset.json").write_text(json.dumps(description))
    return names


def _box(labels: sitk.Image) -> tuple[slice, ...]:
    where = np.argwhere(sitk.GetArrayViewFromImage(labels))[:, ::-1]  # x y z
    centre = (where.min(0) + where.max(0)) // 2
    box = []
    for middle, length, size in zip(centre, BOX, labels.GetSize(), strict=True):
        start = max(0, min(int(middle) - length // 2, size - length))
        box.append(slice(start, min(start + length, size)))
    return tuple(box)
