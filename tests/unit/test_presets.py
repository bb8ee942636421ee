"""The published settings: complete, each value with its source, and equal to the design's table."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.presets import PRESETS, load_preset


@pytest.mark.parametrize(
    ("name", "backbone", "queries", "patch", "upsample", "epochs", "optimizer", "mask_weight", "points", "dice"),
    [
        ("acdc", "vit_b", 8, (4, 256, 256), 4, 500, "SGD", 1.5, 2 * 128**2, 93.39),
        ("synapse", "vit_h", 24, (26, 256, 256), 4, 1000, "SGD", 1.5, 2 * 128**2, 87.23),
        ("amos", "vit_h", 24, (9, 512, 512), 1, 1000, "AdamW", 1.2, 2 * 256**2, 90.52),
    ],
)
def test_values(
    name: str,
    backbone: str,
    queries: int,
    patch: tuple[int, ...],
    upsample: int,
    epochs: int,
    optimizer: str,
    mask_weight: float,
    points: int,
    dice: float,
) -> None:
    preset = load_preset(name)
    assert (preset.backbone, preset.num_queries, preset.patch_size) == (backbone, queries, patch)
    assert (preset.upsample, preset.batch_size, preset.epochs, preset.dice) == (upsample, 2, epochs, dice)
    assert (preset.optimizer.name, preset.optimizer.learning_rate) == (optimizer, 1e-3)
    assert (preset.optimizer.weight_decay, preset.optimizer.gradient_clip) == (3e-5, 12.0)
    assert (preset.loss.mask_bce, preset.loss.mask_dice, preset.loss.num_points) == (mask_weight, mask_weight, points)
    assert preset.loss.semantic == 0 and preset.notes


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_has_a_source(name: str) -> None:
    content = json.loads((files("masksam_nnunet.plans") / "presets" / f"{name}.json").read_text())

    def leaves(entry: dict[str, object]) -> int:
        if "source" in entry:
            assert set(entry) == {"value", "source"} and str(entry["source"]).strip()
            return 1
        return sum(leaves(inner) for inner in entry.values())  # type: ignore[arg-type]

    assert leaves(content["setting"]) == len(load_preset(name).sources) >= 25


def test_labels_and_channels_must_fit() -> None:
    for name, foreground in (("acdc", 3), ("synapse", 8), ("synapse", 13), ("amos", 15)):
        load_preset(name).check_labels(foreground, False, 1)
    for name, foreground, regions, channels in (("acdc", 4, False, 1), ("acdc", 3, True, 1), ("amos", 15, False, 2)):
        with pytest.raises(DataError, match=f"--preset {name}"):
            load_preset(name).check_labels(foreground, regions, channels)
