"""nnU-Net's folders and commands, for integration tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from masksam_nnunet.environment import trainer_folder

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SHORT_TRAINERS = Path(__file__).parent / "integration" / "short_trainers"


@dataclass
class Workspace:
    """nnU-Net's three folders, and its commands."""

    root: Path
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results"

    def run(self, *command: object, fails: bool = False, **env: str) -> str:
        """Run one of the environment's commands; its output. Asserts that it works, or that it fails."""
        name, *arguments = map(str, command)
        done = subprocess.run(
            [str(Path(sys.executable).parent / name), *arguments],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("MASKSAM_", "nnUNet_"))},
                "nnUNet_raw": str(self.raw),
                "nnUNet_preprocessed": str(self.preprocessed),
                "nnUNet_results": str(self.results),
                "nnUNet_extTrainer": os.pathsep.join([str(trainer_folder()), str(SHORT_TRAINERS)]),
                "nnUNet_def_n_proc": "1",
                **self.extra,
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert (done.returncode != 0) == fails, f"{command} exited with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def train(
        self, dataset: object, fold: object, trainer: str, *options: object, fails: bool = False, **env: str
    ) -> str:
        return self.run(
            "nnUNetv2_train", dataset, "3d_fullres", fold, "-tr", trainer, "-device", "cpu", *options,
            fails=fails, nnUNet_n_proc_DA="0", **env,
        )  # fmt: skip

    def model(self, dataset: str, trainer: str) -> Path:
        return self.results / dataset / f"{trainer}__nnUNetPlans__3d_fullres"

    def set_plans(self, dataset: str, **changes: object) -> None:
        """Change the 3d_fullres configuration of the plans: smaller patches for two cores."""
        file = self.preprocessed / dataset / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"].update(changes)
        file.write_text(json.dumps(plans))


@dataclass
class Dataset:
    name: str
    id: int
    num_classes: int
    cases: list[str]


def copy_small(source: Path, target: Path, cases: int) -> list[str]:
    """The first cases of a raw dataset."""
    names = sorted(p.name.removesuffix(".nii.gz") for p in (source / "labelsTr").glob("*.nii.gz"))[:cases]
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / "labelsTr" / f"{name}.nii.gz", target / "labelsTr" / f"{name}.nii.gz")
        shutil.copyfile(source / "imagesTr" / f"{name}_0000.nii.gz", target / "imagesTr" / f"{name}_0000.nii.gz")
    description = json.loads((source / "dataset.json").read_text()) | {"numTraining": len(names)}
    (target / "dataset.json").write_text(json.dumps(description))
    return names
