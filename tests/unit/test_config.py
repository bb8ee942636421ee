"""The config is plain JSON and refuses nonsense by name."""

from __future__ import annotations

import json

import pytest
from configs import PAPER, UNET, tiny_config

from masksam_nnunet.config import ConfigError, Grid, LossConfig, MaskSAMConfig


def test_round_trip_through_text() -> None:
    for changes in ({"matching": "volume", "regions": True}, {"generator": UNET, "encoder_adapters": False}):
        config = tiny_config(loss=LossConfig(semantic=0.25), **changes)
        assert MaskSAMConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("backbone", "vit_x"),
        ("num_queries", 2.5),
        ("resolution", True),
        ("resolution", 3),
        ("intensity_ranges", [[1.0, 0.0]]),
        ("patch_size", (8,)),
        ("patch_size", (0, 8, 8)),
        ("adapter_ratio", 0.0),
        ("prompts", "medium"),
        ("matching", "batch"),
        ("generator", {**UNET.to_json(), "blocks": [1, 1]}),
        ("generator", {**UNET.to_json(), "kind": "heavy"}),
    ],
)
def test_a_bad_value_is_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}\b.* = "):
        tiny_config(**{option: value})
    with pytest.raises(ConfigError, match="matching = 'slice'"):
        tiny_config(**PAPER, generator=UNET)
    with pytest.raises(ConfigError, match="mask_dice"):
        LossConfig(mask_dice=float("nan"))


def test_unknown_and_missing_keys_are_named() -> None:
    data = tiny_config().to_json()
    with pytest.raises(ConfigError, match="colour"):
        MaskSAMConfig.from_json({**data, "colour": 1})
    del data["resolution"]
    with pytest.raises(ConfigError, match="resolution"):
        MaskSAMConfig.from_json(data)
    for part, option in (("loss", "no_object"), ("generator", "widths")):
        data = tiny_config().to_json()
        del data[part][option]
        with pytest.raises(ConfigError, match=option):
            MaskSAMConfig.from_json(data)
    with pytest.raises(ConfigError, match="vit_b"):
        MaskSAMConfig.from_json(["vit_b"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backbone", "patch", "resolution", "padded", "image", "tokens"),
    [
        ("tiny", (10, 256, 224), 4, (256, 224), (1024, 896), (64, 56)),
        ("tiny", (40, 56, 40), 2, (56, 40), (112, 80), (7, 5)),
        ("tiny", (5, 30, 50), 1, (32, 64), (32, 64), (2, 4)),
        ("tiny", (7, 5), 4, (8, 8), (32, 32), (2, 2)),
        ("tiny", (3, 70, 30), 0.5, (96, 32), (48, 16), (3, 1)),
        ("lite_medsam", (4, 160, 150), 0.5, (160, 152), (80, 76), (20, 19)),
        ("lite_medsam", (7, 5), 4, (7, 5), (28, 20), (7, 5)),
        ("lite_medsam", (30, 17), 0.25, (32, 32), (8, 8), (2, 2)),
    ],
)
def test_grid(
    backbone: str,
    patch: tuple[int, ...],
    resolution: float,
    padded: tuple[int, int],
    image: tuple[int, int],
    tokens: tuple[int, int],
) -> None:
    grid = Grid.of(tiny_config(backbone=backbone, patch_size=patch, resolution=resolution))
    assert (grid.padded, grid.image, grid.tokens) == (padded, image, tokens)
    assert grid.masks == (tokens[0] * 4, tokens[1] * 4)
    assert grid.patch == ((1, *patch) if len(patch) == 2 else patch)


def test_architecture_tells_what_shares_weights() -> None:
    config = tiny_config()
    assert config.architecture == tiny_config(checkpointing=True, loss=LossConfig(mask_bce=9)).architecture
    for changes in ({"num_queries": 5}, {"matching": "volume"}, {"generator": UNET}, {"encoder_adapters": False}):
        assert config.architecture != tiny_config(**changes).architecture


def test_queries_of_a_slice() -> None:
    assert [tiny_config(num_queries=m).queries(5) for m in (1, 2)] == [5, 10]
    assert tiny_config(**PAPER).queries(5) == 4
    config = tiny_config(backbone="lite_medsam", encoder_adapters=False)
    assert config.forward_only and config.encoder_ratio == 0 and config.adapter_ratio == 0.25
    assert not tiny_config(encoder_adapters=False).forward_only  # not SAM: it is trained
