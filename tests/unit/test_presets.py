"""The published settings: complete, each value with its source, and equal to the design's table."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.presets import PRESETS, load_preset


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acdc", ("vit_b", 8, (4, 256, 256), 4, 2, 500, 93.39, "SGD", 1.5, 2 * 128**2)),
        ("synapse", ("vit_h", 24, (26, 256, 256), 4, 2, 1000, 87.23, "SGD", 1.5, 2 * 128**2)),
        ("amos", ("vit_h", 24, (9, 512, 512), 1, 2, 1000, 90.52, "AdamW", 1.2, 2 * 256**2)),
    ],
)
def test_values(name: str, expected: tuple[object, ...]) -> None:
    p = load_preset(name)
    sizes = p.backbone, p.num_queries, p.patch_size, p.resolution, p.batch_size, p.epochs, p.dice
    assert (*sizes, p.recipe.optimizer, p.loss.mask_bce, p.loss.num_points) == expected
    assert p.loss.mask_dice == p.loss.mask_bce and p.loss.semantic == p.loss.generator == 0 and p.notes
    assert p.matching == "slice"
    rate = p.recipe.learning_rate, p.recipe.weight_decay, p.recipe.gradient_clip
    assert rate == (1e-3, 3e-5, 12.0)


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
