"""The related methods by their parts: SAM's path at first, the published numbers of parameters, all kinds of data."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from configs import UNET, tiny_config
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from small_sam import SMALL_SAM
from torch import Tensor, nn

from masksam_nnunet.backbones import BACKBONES, Backbone
from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.cost import dice_and_cross_entropy, training_cost
from masksam_nnunet.losses.criterion import SemanticCriterion
from masksam_nnunet.method import MASKSAM, build_network, find_method, methods
from masksam_nnunet.modeling import MaskSAM, SAMNetwork
from masksam_nnunet.modeling.class_decoder import ClassTokenDecoder, PerClassDecoder
from masksam_nnunet.modeling.encoded import Encoded
from masksam_nnunet.modeling.hierarchical import LedTransformer, MaskGate
from masksam_nnunet.modeling.hq import FinerFeatures
from masksam_nnunet.modeling.weight_deltas import SharedFactors

RELATED = [name for name in methods() if name != MASKSAM]
ADAPTING = [name for name in RELATED if find_method(name).adapts_encoder]


def config_for(method: str, **changes: Any) -> MaskSAMConfig:
    """A tiny config of a method."""
    unet = {"generator": UNET} if find_method(method).unet else {}
    adapts = find_method(method).adapts_encoder
    return tiny_config(method=method, encoder_adapters=adapts, **{"patch_size": (3, 32, 48), **unet, **changes})


def make(method: str, channels: int = 1, classes: int = 3, images: int | None = None, **changes: Any) -> SAMNetwork:
    network: SAMNetwork = build_network(config_for(method, **changes), channels, classes, images)
    return network


@pytest.fixture()
def small_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    """``vit_b`` is frozen, as SAM's, and small."""
    monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)


def loss_of(network: SAMNetwork, x: Tensor) -> Tensor:
    """nnU-Net's loss, or one like it, of random labels."""
    labels = torch.randint(0, network.num_classes, (len(x), 1, *x.shape[2:]))
    if network.config.regions:
        labels = (torch.rand(len(x), network.num_classes, *x.shape[2:]) < 0.3).float()
    loss, terms = SemanticCriterion(network.config, dice_and_cross_entropy)(network(x), labels)
    assert terms["semantic"] == loss
    return loss


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3d": ({}, {}),
    "2d, three channels": ({"channels": 3}, {"patch_size": (32, 48)}),
    "regions": ({"classes": 2}, {"regions": True}),
    "a cascade": ({"channels": 3, "images": 1}, {}),
    "five channels, odd size": ({"channels": 5}, {"patch_size": (2, 40, 24)}),
}


PAIRS = [*((method, "vit_b") for method in RELATED), ("samed", "lite_medsam"), ("autosam", "lite_medsam")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "backbone"), PAIRS)
@pytest.mark.usefixtures("small_sam")
def test_a_step_on_every_kind_of_data_moves_what_is_trained(method: str, backbone: str, kind: str) -> None:
    numbers, changes = KINDS[kind]
    network = make(method, **numbers, **{"backbone": backbone, **changes}).train()
    x = torch.randn(2, network.in_channels, *network.config.patch_size)
    loss_of(network, x).backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values()), "DDP would wait for the others"
    assert not any(p.grad is not None for name, p in network.named_parameters() if name not in trained)
    assert any(p.grad.abs().sum() > 0 for name, p in trained.items() if p.grad is not None and "seg_layers" not in name)
    with torch.no_grad():
        predicted = network.eval()(x)
    assert predicted.shape == (2, network.num_classes, *network.config.patch_size) and predicted.isfinite().all()
    assert predicted.flatten(2).std(dim=2).min() > 1e-4, "every map shows the image"


@pytest.mark.parametrize(
    ("backbone", "resolution"), [("tiny", 1), ("tiny", 2), ("lite_medsam", 0.5), ("lite_medsam", 4), ("mobile_sam", 1)]
)
@pytest.mark.parametrize("method", RELATED)
def test_other_backbones(method: str, backbone: str, resolution: float) -> None:
    patch = (2, 32, 32) if backbone == "lite_medsam" and resolution < 1 else (2, 16, 16)
    network = make(method, backbone=backbone, resolution=resolution, patch_size=patch, checkpointing=True).train()
    loss_of(network, torch.randn(1, 1, *patch)).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("backbone", ["vit_b", "lite_medsam"])
@pytest.mark.parametrize("method", ADAPTING)
@pytest.mark.usefixtures("small_sam")
def test_an_adapted_encoder_is_sams_at_first(method: str, backbone: str) -> None:
    """In float64: as far as PyTorch's kernels agree on the same sums in another order."""
    network = make(method, backbone=backbone, patch_size=(2, 32, 32)).double().eval()
    plain = MaskSAM(tiny_config(backbone=backbone, patch_size=(2, 32, 32)), 1, 3).double().eval()
    own = {name: x for name, x in network.sam_tensors().items() if name.startswith("image_encoder.")}
    assert {name for name in plain.sam_tensors() if name.startswith("image_encoder.")} == own.keys()
    plain.load_state_dict(own, strict=False)
    images = torch.randn(1, 2, 3, *network.grid.image, dtype=torch.float64)
    with torch.no_grad():
        for ours, sams in zip(flat(network.image_encoder(images)), flat(plain.image_encoder(images)), strict=True):
            torch.testing.assert_close(ours, sams)
        for name, parameter in network.image_encoder.named_parameters():
            if parameter.requires_grad and not name.startswith("neck."):
                parameter.add_(0.1 * torch.randn_like(parameter))
        changed = network.image_encoder(images)[1]
    assert (changed - plain.image_encoder(images)[1]).abs().max() > 1e-3, "what was added reaches the neck"


def flat(encoded: tuple[list[Tensor], Tensor]) -> list[Tensor]:
    levels, neck = encoded
    return [*levels, neck]


def sams_decoder(backbone: Backbone, masks: int = 4) -> MaskDecoder:
    width = backbone.prompt_width
    transformer = TwoWayTransformer(2, width, backbone.decoder_heads, backbone.decoder_mlp)
    return MaskDecoder(
        transformer_dim=width, transformer=transformer, iou_head_hidden_dim=width, num_multimask_outputs=masks - 1
    )


@pytest.mark.usefixtures("small_sam")
def test_decoders_are_sams_with_its_tokens() -> None:
    config = config_for("samed", backbone="vit_b", patch_size=(2, 64, 64), resolution=4)  # no resizing at the end
    backbone = config.encoder
    sam = sams_decoder(backbone).eval()
    side, width = 16, backbone.prompt_width
    neck, pe, no_mask = torch.randn(1, 2, width, side, side), torch.randn(1, width, side, side), torch.randn(width)
    encoded = Encoded(torch.zeros(1), [], neck, pe, no_mask)
    with torch.no_grad():
        dense = no_mask[:, None, None].expand(1, -1, side, side)
        each = [sam.predict_masks(neck[:, d], pe, torch.zeros(1, 0, width), dense)[0] for d in range(2)]
        expected = torch.stack(each, dim=2)  # (1, 4, 2, 64, 64)
        together = ClassTokenDecoder(config, 1, 4).eval()
        together.load_state_dict(sam.state_dict(), strict=False)
        heads: Any = together.classes.seg_layers
        heads["tokens"].weight.copy_(sam.mask_tokens.weight)
        heads["mlps"].load_state_dict(sam.output_hypernetworks_mlps.state_dict())
        torch.testing.assert_close(together(encoded)[0], expected)
        alone = PerClassDecoder(config).eval()
        alone.load_state_dict(sam.state_dict())
        tokens = torch.cat([sam.iou_token.weight, sam.mask_tokens.weight])
        maps = alone.decode_classes(encoded, [tokens] * 3, [no_mask[:, None, None]] * 3)
        torch.testing.assert_close(maps, expected[:, :1].expand(-1, 3, -1, -1, -1))
        first = build_network(replace(config, method="h_sam"), 1, 4).mask_decoder.eval()
        first.load_state_dict(together.state_dict(), strict=False)
        linear: Any = build_network(replace(config, method="autosam_linear"), 1, 4).mask_decoder.eval()
        linear.output_upscaling.load_state_dict(sam.output_upscaling.state_dict())
        pixels = linear.head(sam.output_upscaling(neck[0]))  # (2, 4, 64, 64)
        torch.testing.assert_close(linear(encoded)[0][0], pixels.transpose(0, 1))
        mean, second, maps = first(encoded)
        torch.testing.assert_close(maps, expected)
        torch.testing.assert_close(mean, (maps + second) / 2)


@pytest.mark.usefixtures("small_sam")
def test_the_finer_decoders_are_sams_without_what_they_add() -> None:
    """HQ-SAM's without its finer maps, and H-SAM's second transformer where all classes are alike."""
    config = config_for("hq_sam", backbone="vit_b", patch_size=(1, 64, 64), resolution=4)
    backbone, classes = config.encoder, 3
    side, width = 16, backbone.prompt_width
    neck, pe, no_mask = torch.randn(1, 1, width, side, side), torch.randn(1, width, side, side), torch.randn(width)
    level = torch.randn(1, 1, side, side, backbone.width)
    sam = sams_decoder(backbone, 2 * classes).eval()
    hq: Any = build_network(config, 1, classes).mask_decoder.eval()
    with torch.no_grad():
        own = {k: x for k, x in sam.state_dict().items() if k.startswith(("transformer", "iou_token", "output_upsc"))}
        hq.load_state_dict(own, strict=False)
        for number, head in enumerate((hq.classes, hq.finer_classes)):
            tokens = sam.mask_tokens.weight[number * classes : (number + 1) * classes]
            head.seg_layers["tokens"].weight.copy_(tokens)
            head.seg_layers["mlps"].load_state_dict(sam.output_hypernetworks_mlps[:classes].state_dict())
        for mlp in hq.finer_classes.seg_layers["mlps"]:
            mlp.layers[-1].weight.zero_()
            mlp.layers[-1].bias.zero_()
        dense = no_mask[:, None, None].expand(1, -1, side, side)
        expected = sam.predict_masks(neck[:, 0], pe, torch.zeros(1, 0, width), dense)[0][:, :classes]
        torch.testing.assert_close(hq(Encoded(torch.zeros(1), [level], neck, pe, no_mask))[0][:, :, 0], expected)

        led = LedTransformer(width, backbone.decoder_heads, backbone.decoder_mlp).eval()
        led.load_state_dict(sam.transformer.state_dict())
        tokens, image = torch.randn(1, classes, width), neck[:, 0]
        found, keys = led(image, pe, tokens, torch.full((1, classes, side**2), -1.1))
        expected, expected_keys = sam.transformer(image, pe, tokens)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(keys.flatten(2).transpose(1, 2), expected_keys)


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def vit_b(method: str, classes: int) -> SAMNetwork:
    with torch.device("meta"):
        unet = {"generator": UNET} if find_method(method).unet else {}
        config = MaskSAMConfig(
            "vit_b", (1, 512, 512), 1, method=method, encoder_adapters=find_method(method).adapts_encoder, **unet
        )
        network: SAMNetwork = build_network(config, 1, classes)
    return network


@pytest.mark.parametrize(
    ("method", "classes", "millions"),
    [("samed", 9, 4.91), ("ma_sam", 9, 30.1), ("h_sam", 9, 12.5), ("autosam", 4, 20.7), ("autosam_linear", 4, 0.075)],
)
def test_trained_parameters_are_the_published_ones(method: str, classes: int, millions: float) -> None:
    assert trained(vit_b(method, classes)) / 1e6 == pytest.approx(millions, rel=0.03)


def test_other_published_numbers() -> None:
    tokens = vit_b("autosam_tokens", 4)
    decoder: Any = tokens.mask_decoder
    unread = sum(p.numel() for p in decoder.output_hypernetworks_mlps[1].parameters())
    assert (trained(tokens) + unread) / 1e6 == pytest.approx(3.65, rel=0.03), "the authors count a head never read"
    hq: Any = vit_b("hq_sam", 1).mask_decoder
    assert isinstance(hq.finer_features, FinerFeatures)
    assert (trained(hq.finer_features) + trained(hq.finer_classes)) / 1e6 == pytest.approx(1.07, rel=0.03)
    adapters: Any = vit_b("ma_sam", 9).image_encoder
    assert sum(trained(block.before) for block in adapters.blocks) / 1e6 == pytest.approx(24.8, rel=0.03)
    deltas = sum(trained(block.attn.qkv.change) for block in vit_b("samed", 9).image_encoder.blocks)  # type: ignore
    assert deltas / 1e6 == pytest.approx(0.147, rel=0.03)


@pytest.mark.usefixtures("small_sam")
def test_blocks_share_the_factors_of_fact() -> None:
    network = deepcopy(make("ma_sam", backbone="vit_b"))
    encoder: Any = network.image_encoder
    names = [name for name in network.state_dict() if ".u." in name or ".v." in name]
    assert names == [f"image_encoder.shared.width_32.{part}.weight" for part in "uv"]
    assert all(block.attn.qkv.change._shared[0] is encoder.shared["width_32"] for block in encoder.blocks)
    assert isinstance(encoder.shared["width_32"], SharedFactors)
    assert set(names).isdisjoint(network.sam_tensors())


def test_the_weight_moves_to_the_second_stage_and_the_gate_learns() -> None:
    weights = find_method("h_sam").weights
    assert weights is not None
    first, middle, last = (weights(progress) for progress in (0.0, 0.5, 1.0))
    assert first == pytest.approx((0, 0.6, 0.4)) and last[1] > 0.97 > middle[1] > 0.6
    network = make("h_sam")
    criterion = SemanticCriterion(network.config, lambda logits, _: logits.mean())
    maps = tuple(torch.full((1, 3, 3, 32, 48), value) for value in (100.0, 1.0, 2.0))
    truth = torch.zeros(1, 1, 3, 32, 48)
    assert criterion(maps, truth)[0].item() == pytest.approx(0.6 + 0.4 * 2)
    criterion.progress = 1.0
    assert criterion(maps, truth)[0].item() == pytest.approx(1.0, abs=0.05)
    gate = MaskGate(3)
    shares = gate(torch.randn(2, 3, 8, 8))
    assert shares.shape == (2, 1, 8, 8) and shares.std() > 0
    shares.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in gate.named_parameters() if "weight" in n)


@pytest.mark.usefixtures("small_sam")
def test_the_first_stage_of_a_cascade_is_seen() -> None:
    for method in RELATED:
        network = make(method, channels=3, images=1, backbone="vit_b").eval()
        x = torch.randn(1, 3, 3, 32, 48)
        other = torch.cat([x[:, :1], -x[:, 1:]], dim=1)
        with torch.no_grad():
            if network.previous_stage is not None:  # type: ignore[union-attr]
                torch.testing.assert_close(network(x), network(other))  # nothing at first
                network.previous_stage.project.weight.normal_()  # type: ignore[union-attr]
            assert (network(x) - network(other)).abs().max() > 1e-4, method


def test_a_frozen_encoder_sees_every_channel() -> None:
    network = make("autosam", channels=5, backbone="lite_medsam", patch_size=(1, 32, 32)).eval()
    with torch.no_grad():
        plain = network(torch.zeros(1, 5, 1, 32, 32))
        for channel in range(5):
            x = torch.zeros(1, 5, 1, 32, 32)
            x[:, channel] = 1
            assert (network(x) - plain).abs().max() > 1e-6, channel


def test_configs_name_methods() -> None:
    with pytest.raises(ConfigError, match="method = 'sam_ed'"):
        tiny_config(method="sam_ed")
    plain, other = tiny_config(), config_for("samed")
    assert "method" not in plain.architecture and other.architecture.startswith("method=samed ")
    assert MaskSAMConfig.from_json(other.to_json()) == other
    with pytest.raises(ConfigError, match="method = 'nnsam'"):
        tiny_config(method="nnsam", encoder_adapters=False)


def test_an_encoder_of_the_users_own_takes_methods_that_leave_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder(nn.Module):
        def __init__(self, backbone: Backbone, _: MaskSAMConfig) -> None:
            super().__init__()
            self.neck = nn.Conv2d(3, backbone.prompt_width, 16, stride=16)

        def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
            neck = self.neck(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            return [neck.permute(0, 1, 3, 4, 2)] * 4, neck

    monkeypatch.setitem(BACKBONES, "own", replace(BACKBONES["tiny"], name="own", width=64, encoder=Encoder))
    network = make("autosam", backbone="own").train()
    loss_of(network, torch.randn(1, 1, 3, 32, 48)).backward()
    with pytest.raises(ConfigError, match="method = 'samed'"):
        make("samed", backbone="own")


@pytest.mark.parametrize("backbone", ["tiny", "vit_b", "vit_l", "vit_h", "medsam_vit_b", "lite_medsam", "mobile_sam"])
@pytest.mark.parametrize("method", RELATED)
def test_a_step_on_every_backbone_without_memory(method: str, backbone: str) -> None:
    """Forward and backward pass at the backbone's full size, on tensors without content."""
    config = config_for(method, backbone=backbone, patch_size=(2, 32, 32))
    cost = training_cost(config, 1, 3, 1)
    assert cost.peak_bytes > 0 and cost.flops > 0
