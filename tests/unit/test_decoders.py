"""The prompt generator that is nnU-Net's U-Net: nnU-Net without SAM, and SAM's levels where they belong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from configs import UNET, tiny_config
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from masksam_nnunet.config import Grid, UNetConfig
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.decoders import UNetDecoder
from masksam_nnunet.plans.architecture import unet_config


def narrow(config: UNetConfig) -> UNetConfig:
    return replace(config, features=(4,) * len(config.features), blocks=(1,) * len(config.features))


def decoder_of(backbone: str, patch: tuple[int, ...], resolution: float, unet: UNetConfig) -> UNetDecoder:
    config = tiny_config(backbone=backbone, patch_size=patch, resolution=resolution, generator=unet)
    given = config.encoder, unet, Grid.of(config)
    return UNetDecoder(*given, in_channels=2, num_queries=3, deep=True)


def levels_of(decoder: UNetDecoder, backbone: str) -> tuple[list[Tensor], Tensor]:
    """Any features, as an encoder gives them."""
    encoder = tiny_config(backbone=backbone).encoder
    depth, (rows, columns) = decoder.grid.patch[0], decoder.grid.tokens
    levels = [torch.randn(2, depth, x.scale * rows, x.scale * columns, x.width) for x in encoder.fed_levels]
    return levels, torch.randn(2, depth, encoder.prompt_width, rows, columns)


@pytest.mark.parametrize("resolution", [0.25, 1])  # at 1/4 SAM's neck is coarser than any skip
@pytest.mark.parametrize("residual", [False, True])
def test_without_sam_it_is_nnunets(residual: bool, resolution: float) -> None:
    unet = replace(UNET, residual=residual)
    decoder = decoder_of("lite_medsam", (3, 24, 40), resolution, unet)
    kind = ResidualEncoderUNet if residual else PlainConvUNet
    of_encoder = {"n_blocks_per_stage" if residual else "n_conv_per_stage": unet.blocks}
    theirs = kind(
        input_channels=2,
        n_stages=4,
        features_per_stage=unet.features,
        conv_op=nn.Conv3d,
        kernel_sizes=unet.kernel_sizes,
        strides=unet.strides,
        num_classes=3,
        n_conv_per_stage_decoder=(1 if residual else 2,) * 3,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        **of_encoder,
    )
    theirs.load_state_dict(decoder.unet.state_dict())
    x, given = torch.randn(2, 2, 3, 24, 40), levels_of(decoder, "lite_medsam")
    _, maps = decoder(x, *given)
    torch.testing.assert_close(list(maps), theirs(x)[:-1])  # nnU-Net gives the coarsest no weight
    assert len(decoder.eval()(x, *given)[1]) == 1
    for module in decoder.sam:
        if hasattr(module, "gain"):
            nn.init.constant_(module.gain, 0.1)
    _, with_sam = decoder(x, *given)
    assert (with_sam[0] - maps[0]).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("backbone", "resolution", "fed"),
    [
        ("lite_medsam", 0.5, [(), (0,), (1,), (2, 3, 4), (2, 3, 4), (2, 3, 4)]),  # of strides 2, 4, 8, 8; the neck
        ("lite_medsam", 4, [(2, 3, 4)] * 6),
        ("vit_b", 1, [(), (), (), (), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]),
    ],
)
def test_each_stage_is_fed_by_the_levels_of_its_stride(backbone: str, resolution: float, fed: list[object]) -> None:
    unet = narrow(unet_config((1, 1), (128, 128)))
    assert [math.prod(s[1] for s in unet.strides[: i + 1]) for i in range(6)] == [1, 2, 4, 8, 16, 32]
    with torch.device("meta"):
        decoder = decoder_of(backbone, (128, 128), resolution, unet)
    assert decoder.fed == fed


@pytest.mark.parametrize(
    ("patch", "resolution"), [((4, 40, 24), 0.5), ((2, 44, 20), 0.5), ((3, 36, 64), 0.25), ((6, 20, 24), 2)]
)
def test_levels_lie_over_the_voxels_that_they_show(patch: tuple[int, ...], resolution: float) -> None:
    """Also where they reach beyond the patch."""
    unet = narrow(unet_config((1, 1, 1), patch))
    decoder = decoder_of("lite_medsam", patch, resolution, unet)
    levels, neck = levels_of(decoder, "lite_medsam")
    maps = [*(x.permute(0, 4, 1, 2, 3) for x in levels), neck.transpose(1, 2)]
    stride = torch.ones(3, dtype=torch.long)
    seen = 0
    for fed, step in zip(decoder.fed, unet.strides, strict=True):
        stride = stride * torch.tensor(step)
        size = [side // by for side, by in zip(patch, stride.tolist(), strict=True)]
        for index in fed:
            cell = decoder.grid.padded[0] // maps[index].shape[-2]  # patch voxels
            if cell > stride[1:].min():  # the neck at the bottleneck, which is interpolated
                continue
            voxels = maps[index].repeat_interleave(cell, -1).repeat_interleave(cell, -2)[..., : patch[1], : patch[2]]
            expected = F.avg_pool3d(voxels, tuple(stride.tolist()))
            torch.testing.assert_close(decoder._at(maps[index], torch.empty(2, 1, *size)), expected)
            seen += 1
    assert seen


@pytest.mark.parametrize("backbone", ["tiny", "lite_medsam"])
@pytest.mark.parametrize("patch", [(3, 37, 22), (5, 24, 40), (17, 32), (16, 7), (2, 1, 1)])
def test_any_patch_is_built_and_run(backbone: str, patch: tuple[int, ...]) -> None:
    for residual, resolution in ((False, 0.5), (True, 1)):
        unet = narrow(unet_config((1.0,) * len(patch), patch, residual))
        config = tiny_config(backbone=backbone, patch_size=patch, resolution=resolution, generator=unet)
        network, x = MaskSAM(config, 2, 3), torch.randn(1, 2, *patch)
        with torch.no_grad():
            output, predicted = network.train()(x), network.eval()(x)
        assert output.class_maps[0].shape == (1, 3, *network.grid.patch) and predicted.shape == (1, 3, *patch)
        assert all(part.isfinite().all() for part in (*output[:4], *output.class_maps, predicted))
