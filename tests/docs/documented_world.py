"""The folder that a page's commands are run in: tiny data under the names that the pages use."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import challenge_replicas
import pytest
from challenge_replicas import build_acdc, build_amos, build_msd, build_synapse, tar_of
from documented import ROOT, Line, script
from kinds_of_data import Kind
from loopback import serving
from small_sam import write_small_sam

HERE = Path(__file__).parent
SAM_FILE = "sam_vit_b_01ec64.pth"
ACDC_PATIENTS = 10
"""Of 100, which small/sitecustomize.py lets pass: every fold validates a fifth of them."""
PROSTATE = Kind(
    28, "Prostate", [(6, 24, 24)] * 10, {"background": 0, "zone": 1, "lesion": 2}, (1, 2), channels=2,
    more={"channel_names": {"0": "T2", "1": "ADC"}},
)  # fmt: skip


@dataclass
class World:
    """A folder, and the variables of a shell in it."""

    root: Path
    variables: dict[str, str]

    def run(self, lines: Sequence[Line], timeout: float) -> str:
        """Run command lines in one bash; their output. Asserts that all work."""
        log = self.root / "output.log"  # to be looked at while it grows: pages take minutes
        with log.open("a", encoding="utf-8") as stream:
            before = stream.tell()
            done = subprocess.run(
                ["bash", "-c", script(list(lines))],
                cwd=self.root,
                env=self.variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        said = log.read_bytes()[before:].decode(errors="replace")
        assert done.returncode == 0, f"exit code {done.returncode}:\n{said[-6000:]}"
        return said


@contextmanager
def new_world(root: Path) -> Iterator[World]:
    """The folder with its data, and servers of what the pages fetch."""
    write_data(root)
    sam = write_small_sam(root / SAM_FILE).read_bytes()
    tar = tar_of(root / "Task04_Hippocampus")
    with serving(SAM_FILE, sam) as weights, serving("Task04_Hippocampus.tar", tar) as hippocampus:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MASKSAM_", "nnUNet_", "SLURM_"))}
        yield World(
            root,
            kept
            | {
                "HOME": str(root),
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONPATH": os.pathsep.join(map(str, (HERE / "small", HERE.parent))),
                "NO_PROXY": "127.0.0.1",
                "MASKSAM_CACHE": str(root / "cache"),
                "MASKSAM_WEIGHTS_URL": weights.url.rpartition("/")[0] + "/",
                "DOCS_SAM_SHA256": hashlib.sha256(sam).hexdigest(),
                "DOCS_ACDC_PATIENTS": str(ACDC_PATIENTS),
                "DOCS_HIPPOCAMPUS": f"{hippocampus.url} {hashlib.md5(tar, usedforsecurity=False).hexdigest()}",
                "nnUNet_raw": str(root / "raw"),
                "nnUNet_preprocessed": str(root / "preprocessed"),
                "nnUNet_results": str(root / "results"),
                "nnUNet_def_n_proc": "1",
                "OMP_WAIT_POLICY": "PASSIVE",  # nnU-Net takes all cores: threads that spin are slow on busy ones
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            },
        )


MODULE = Path("my_trainers/my_masksam.py")
"""Where docs/extending.md has its reader write its python blocks."""


def write_module(root: Path) -> Path:
    """The python blocks of docs/extending.md as the module that they make up."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f"`{MODULE}`" in page
    file = root / MODULE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "\n\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)), encoding="utf-8"
    )
    return file


def write_data(root: Path) -> None:
    """Downloads, a dataset of one's own, images to predict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(challenge_replicas, "shape_of", lambda seed: (12 + seed % 3, 14 + seed // 3 % 4, 10 + seed % 2))
        build_acdc(root / "acdc", training=range(1, ACDC_PATIENTS + 1)).rename(root / "DOWNLOAD")
        build_synapse(root / "btcv").rename(root / "SYNAPSE")
        build_amos(root / "amos").rename(root / "AMOS")
        build_msd(root, training=range(1, 20, 2), test=(2, 4))
    folder = PROSTATE.write(root / "raw")
    for index, case in enumerate(PROSTATE.cases):  # two visits of each patient
        name = f"patient{index // 2:02d}_visit{index % 2 + 1}"
        for file in [*folder.glob(f"imagesTr/{case}_*"), *folder.glob(f"labelsTr/{case}.*")]:
            file.rename(file.with_name(file.name.replace(case, name)))
    images = root / "IMAGES"
    images.mkdir()
    for frame in sorted((root / "DOWNLOAD" / "testing").glob("patient10[12]/patient???_frame??.nii.gz")):
        shutil.copy(frame, images / frame.name.replace(".nii.gz", "_0000.nii.gz"))
    shutil.copytree(ROOT / "docs" / "cluster", root / "docs" / "cluster")
    write_module(root)


def recorded_commands(lines: Sequence[Line], root: Path) -> list[list[str]]:
    """The commands that bash would run, with their words as bash makes them; none is run."""
    file = root / "commands.json"
    recorder = root / "record.py"
    recorder.write_text(
        "import json, sys\nwith open(sys.argv[1], 'a') as f: f.write(json.dumps(sys.argv[2:]) + '\\n')\n"
    )
    names = {word for line in lines for word in line.text.split() if "/" in word and word.endswith(".sh")}
    functions = [f'command_not_found_handle() {{ {sys.executable} -S "{recorder}" "{file}" "$@"; }}']
    functions += [f'{name}() {{ command_not_found_handle {name} "$@"; }}' for name in sorted(names)]
    functions.append('.() { command_not_found_handle . "$@"; }')
    text = "\n".join([*functions, "PATH=/nowhere", *(line.text for line in lines)])
    done = subprocess.run(["/bin/bash", "-c", text], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
