"""The assembled network: any size, gradients where they belong, slices connected within a volume only."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from configs import PAPER, UNET, loss_config, tiny_config
from small_sam import SMALL_SAM
from torch import Tensor, nn

from masksam_nnunet.backbones import BACKBONES, Backbone
from masksam_nnunet.config import Grid
from masksam_nnunet.errors import WeightsError
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput, count_parameters
from masksam_nnunet.modeling.adapters import DConvAdapter
from masksam_nnunet.modeling.image_encoder import AdaptedImageEncoder
from masksam_nnunet.modeling.sam_network import LARGEST
from masksam_nnunet.modeling.stem import InputStem
from masksam_nnunet.semantic import semantic_log_probabilities


def image(network: MaskSAM, batch: int = 1) -> Tensor:
    return torch.randn(batch, network.in_channels, *network.config.patch_size)


def randomise(network: torch.nn.Module) -> None:
    """Give every zero-initialised layer something to say."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def some_loss(output: MaskSAMOutput) -> Tensor:
    """Of everything that a network returns."""
    parts = (*output[:4], *output.class_maps)
    return torch.stack([(part - torch.linspace(-1, 1, part.shape[-1])).square().mean() for part in parts]).sum()


def test_another_input_or_number_of_channels_is_refused() -> None:
    network = MaskSAM(tiny_config(), 1, 2)
    for shape in ((1, 2, 3, 32, 48), (1, 1, 32, 48), (1, 1, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"batch, 1, 3, 32, 48"):
            network(torch.zeros(shape))
    with pytest.raises(ValueError, match="num_classes = 0"):
        MaskSAM(tiny_config(), 1, 0)
    with pytest.raises(ValueError, match="image_channels = 3"):
        MaskSAM(tiny_config(), 2, 2, image_channels=3)


@pytest.mark.parametrize(("backbone", "mean", "deviation"), [("lite_medsam", 0.0, 1.0), ("tiny", 0.485, 0.229)])
def test_sam_sees_each_image_channel_from_black_to_white(backbone: str, mean: float, deviation: float) -> None:
    config = tiny_config(backbone=backbone, intensity_ranges=((-1.0, 3.0), (0.0, 255.0)))
    stem = InputStem(config, in_channels=4, image_channels=2)
    x = torch.randn(2, 4, 3, 32, 48)
    images, _ = stem(x)  # (2, 3, 3, 32, 48)
    torch.testing.assert_close(images[:, :, 0], ((x[:, 0] + 1) / 4 - mean) / deviation)
    black_and_white = torch.tensor([-1.0, 3.0, 0.0, 255.0]).view(1, 4, 1, 1, 1)
    black, white = (stem._plain(black_and_white[:, i::2]) for i in (0, 1))
    torch.testing.assert_close((white - black)[0, 0].squeeze(), torch.tensor(1 / deviation))
    with pytest.raises(ValueError, match="intensity_ranges"):
        InputStem(config, in_channels=4, image_channels=3)


def test_soft_prompts_carry_gradients_and_hard_ones_do_not() -> None:
    for prompts, carried in (("soft", True), ("hard", False)):
        network = MaskSAM(tiny_config(**PAPER, prompts=prompts), 1, 3)
        randomise(network)
        network.train()(image(network)).mask_logits.square().mean().backward()
        generator = network.prompt_generator
        for head in (generator.decoder.seg_layers[0], generator.seg_layers["to_boxes"]):
            moved = head.weight.grad is not None and bool(head.weight.grad.abs().sum() > 0)
            assert moved == carried


@pytest.fixture()
def small_sam(monkeypatch: pytest.MonkeyPatch) -> str:
    """A frozen backbone of SAM's kind, windows included, small enough to train here."""
    monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)
    return "vit_b"


def cancelled(name: str) -> bool:
    """Biases whose effect the normalisation that follows takes away: instance norm, channel by channel."""
    within = ("stem.features", "mask_head.convs", "decoder.unet", "decoder.sam")
    return name.endswith(("conv.bias", "project.bias")) and any(part in name for part in within)


@pytest.mark.parametrize(
    ("backbone", "steps", "changes"),
    [
        ("vit_b", 2, PAPER),
        ("mobile_sam", 2, PAPER),
        ("vit_b", 4, {"generator": UNET, "resolution": 4}),
        ("lite_medsam", 4, {"num_queries": 2}),
        ("lite_medsam", 4, {"generator": UNET, "encoder_adapters": False}),
    ],
)
@pytest.mark.usefixtures("small_sam")
def test_few_steps_move_every_new_parameter_and_nothing_of_sam(
    backbone: str, steps: int, changes: dict[str, Any]
) -> None:
    """SAM's decoder has no gradient before its gains have moved, its adapters none before their last layers have."""
    network = MaskSAM(tiny_config(**{"backbone": backbone, "patch_size": (3, 48, 32), **changes}), 2, 3).train()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    x = image(network, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        some_loss(network(x)).backward()
        optimizer.step()
    sam, frozen = network.sam_tensors(), network.prompt_generator.decoder.unused()
    never = {p for module in frozen for p in module.parameters()}
    if network.config.forward_only:
        never |= set(network.image_encoder.parameters())
    for name, parameter in network.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert parameter.isfinite().all()
        if name in sam or parameter in never:
            assert not moved and not parameter.requires_grad, name
        elif not cancelled(name):
            assert moved, name


@pytest.mark.parametrize("patch", [(3, 32, 48), (24, 40)])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("generator", ["light", "unet"])
def test_at_the_start_the_output_is_the_generators_map(
    generator: str, regions: bool, each: int, patch: tuple[int, ...]
) -> None:
    changes = {"generator": UNET} if generator == "unet" else {}
    config = tiny_config(patch_size=patch, resolution=4, num_queries=each, regions=regions, **changes)
    network = MaskSAM(config, 1, 3).train()
    with torch.no_grad():
        for name, parameter in network.prompt_generator.decoder.named_parameters():
            if "seg_layers" in name:
                parameter *= 20  # of any size, as after a training
        x = image(network, 2)
        output = network(x)
        semantic = semantic_log_probabilities(output.class_logits, output.mask_logits, regions, True)
        predicted = network.eval()(x)
    logits, constant = output.class_maps[0], torch.tensor(6.0).sigmoid().log()
    assert logits.shape == (2, 3, *network.grid.patch) and len(output.class_maps) == (2 if generator == "unet" else 3)
    if not regions:
        torch.testing.assert_close(semantic, logits.log_softmax(1), atol=1e-5, rtol=1e-5)
    elif each == 1:
        torch.testing.assert_close(semantic, logits + constant, atol=1e-5, rtol=1e-5)
    else:
        assert ((logits - semantic) >= -1e-5).all() and ((logits - semantic) <= -each * constant + 1e-5).all()
    assert logits.std() > 1
    semantic = semantic.clamp(-LARGEST, LARGEST)
    torch.testing.assert_close(predicted, semantic[:, :, 0] if len(patch) == 2 else semantic)


@pytest.mark.usefixtures("small_sam")
def test_without_adapters_the_encoder_is_sams_and_nothing_in_it_is_trained() -> None:
    for backbone in ("vit_b", "lite_medsam"):
        ours, adapted = (
            MaskSAM(tiny_config(backbone=backbone, encoder_adapters=adapters), 2, 3).train()
            for adapters in (False, True)
        )
        sam = adapted.sam_tensors()
        assert ours.sam_tensors().keys() == sam.keys()
        ours.load_state_dict({name: x.detach() for name, x in sam.items()}, strict=False)
        x = image(ours)
        levels, neck = ours.image_encoder(ours.stem(x)[0])
        expected_levels, expected = adapted.image_encoder(adapted.stem(x)[0])  # adapters add zero at first
        torch.testing.assert_close([*levels, neck], [*expected_levels, expected], rtol=0, atol=0)
        assert not any(part.requires_grad for part in (*levels, neck)) and expected.requires_grad
        assert not any(p.requires_grad for p in ours.image_encoder.parameters())
        ours_alone = {name for name, _ in ours.named_parameters() if name.startswith("image_encoder.")} - sam.keys()
        assert ours_alone == {"image_encoder.depth_embedding.weight"}


def test_the_first_boxes_are_the_middle() -> None:
    generator = MaskSAM(tiny_config(), 1, 3).prompt_generator
    nn.init.zeros_(generator.seg_layers["to_boxes"].weight)
    features = tuple(torch.randn(2, width, 3, 8, 8) for width in generator.decoder.widths)
    boxes = generator._boxes(features, torch.full((2, 3, 3, 8, 12), -1.0))  # of empty masks
    torch.testing.assert_close(boxes, torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(2, 3, 3, 4))


@pytest.mark.parametrize("changes", [{}, {"generator": UNET}, PAPER], ids=["light", "unet", "paper"])
def test_prompts_know_nothing_beyond_the_patch(changes: dict[str, Any]) -> None:
    network = MaskSAM(tiny_config(patch_size=(3, 24, 40), **changes), 1, 3)  # SAM sees 32x48
    generator: Any = network.prompt_generator
    decoder = generator.decoder
    finest = decoder.unet.decoder.seg_layers[-1] if "generator" in changes else decoder.seg_layers[0]
    with torch.no_grad():
        finest.bias[1] = 50.0  # it is everywhere
        generator.seg_layers["to_boxes"].weight.zero_()
        output = network.outputs(image(network))
    masks, boxes = output.aux_mask_logits, output.aux_boxes[:, :, 1]
    assert masks.shape[-2:] == (8, 12) and masks.std(-1).max() > 0
    assert (masks[:, :, 1] > 10).all(), "also beyond the patch, of 6 rows and 10 columns"
    torch.testing.assert_close(masks[..., 6, :], masks[..., 7, :])
    torch.testing.assert_close(masks[..., 10], masks[..., 11])
    extent, learned = torch.tensor([0, 0, 40 / 48, 24 / 32]), torch.tensor([0.25, 0.25, 0.75, 0.75])
    torch.testing.assert_close(boxes, ((extent + learned) / 2).expand_as(boxes))


def test_masks_of_any_size_do_not_drown_the_features_of_the_mask_head() -> None:
    network = MaskSAM(tiny_config(), 1, 3)
    head, grid = network.mask_head, network.grid
    nn.init.normal_(head.seg_layers["residual"].weight)
    features = torch.randn(1, network.prompt_generator.decoder.widths[0], 3, *grid.masks)
    stem = torch.randn(1, network.config.stem_width, *grid.patch)
    signs = torch.randn(1, 3, 3, 1, 1).sign().expand(-1, -1, -1, *grid.masks)
    with torch.no_grad():  # the gain is zero: what is left is the residual
        at_20, at_2000 = (head(x * signs, torch.zeros(1, 3, *grid.patch), features, stem) for x in (20, 2000))
    assert at_20.std() > 0.1
    torch.testing.assert_close(at_2000, at_20, atol=1e-3, rtol=1e-3)


def test_what_is_predicted_fits_into_float16() -> None:
    """nnU-Net sums windows, weighted up to 10, in float16."""
    network = MaskSAM(tiny_config(), 1, 3).eval()
    with torch.no_grad():
        network.prompt_generator.decoder.seg_layers[0].weight *= 1e4
        predicted = network(image(network))
    assert predicted.min() < -40 and torch.isfinite((predicted * 10 * 64).half()).all()


def test_what_overflows_float16_is_predicted_in_bfloat16() -> None:
    network = MaskSAM(tiny_config(), 1, 3).eval()
    x, maps = image(network), network.prompt_generator.decoder.seg_layers[0]

    def predict(dtype: torch.dtype) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            return network(x)

    assert not torch.equal(predict(torch.float16), predict(torch.bfloat16))
    with torch.no_grad():
        maps.weight *= 1e6
    assert torch.equal(predict(torch.float16), predict(torch.bfloat16))


def test_120_classes() -> None:
    config = tiny_config(patch_size=(2, 32, 32), loss=loss_config())
    network = MaskSAM(config, 1, 120).train()
    output = network(image(network))
    assert output.class_logits.shape == (1, 2, 120, 121) and output.mask_logits.shape == (1, 2, 120, 32, 32)
    loss, terms = MaskSAMCriterion(config, 120)(output, torch.randint(120, (1, 1, 2, 32, 32)))
    loss.backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    with torch.no_grad():
        probabilities = network.eval()(image(network)).exp()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 2, 32, 32))


@pytest.mark.parametrize(("channels", "kept"), [(1, False), (2, True)])
def test_layers_before_the_first_adapter_are_kept_only_for_a_mix_of_channels(channels: int, kept: bool) -> None:
    config = tiny_config(backbone="lite_medsam", patch_size=(2, 32, 48))
    network = MaskSAM(config, channels, 3).train()
    seen: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    images, _ = network.stem(image(network))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        levels, _ = network.image_encoder(images)
    assert levels[0].requires_grad == kept and levels[1].requires_grad
    assert ((2, *network.grid.image, 3) in seen) == kept, "the input of recomputed layers"
    assert not any(shape[1:] == (*network.grid.masks, 256) for shape in seen), "expanded maps"


def test_a_frozen_encoder_without_adapters_sees_every_channel() -> None:
    config = tiny_config(backbone="lite_medsam", patch_size=(2, 32, 48), encoder_adapters=False, generator=UNET)
    network = MaskSAM(config, 5, 3)
    assert isinstance(network.stem.mix, Tensor) and not isinstance(network.stem.mix, nn.Parameter)
    x = image(network)
    images, _ = network.stem(x)
    for channel in range(5):
        changed = x.clone()
        changed[:, channel] += 1
        assert not torch.allclose(network.stem(changed)[0], images), channel


@pytest.mark.parametrize("resolution", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("patch", [(2, 24, 40), (17, 30)])
def test_a_fine_encoder_takes_every_resolution(resolution: float, patch: tuple[int, ...]) -> None:
    network = MaskSAM(tiny_config(backbone="lite_medsam", patch_size=patch, resolution=resolution), 1, 3)
    with torch.no_grad():
        output = network.train()(image(network))
        semantic = network.eval()(image(network))
    assert output.mask_logits.shape[-2:] == patch[-2:] and semantic.shape == (1, 3, *patch)
    assert output.aux_mask_logits.shape[-2:] == network.grid.masks
    assert all(part.isfinite().all() for part in (*output[:4], semantic))


@pytest.mark.parametrize("changes", [{}, {"generator": UNET}, PAPER])
def test_the_tiny_network_trains_all_but_what_is_never_used(changes: dict[str, Any]) -> None:
    network = MaskSAM(tiny_config(**changes), 1, 3).train()
    some_loss(network(image(network))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert frozen and all(
        any(part in n for part in ("iou_prediction_head", "hypernetworks", "point", "no_mask", "seg_layers.0"))
        for n in frozen
    )


def test_depth_reaches_neighbours_through_every_block_and_stays_in_its_volume() -> None:
    backbone = Backbone("narrow", 32, 3, 2, (2,), window=2, prompt_width=16)
    config = tiny_config(patch_size=(7, 48, 80))
    encoder = AdaptedImageEncoder(backbone, config)
    x = torch.randn(2, 7, 3, *Grid.of(config).image)
    changed = x.clone()
    changed[0, 3] += 1.0
    for index in range(backbone.depth):  # this block's adapters alone speak, window blocks (0, 1) and global (2)
        for i, block in enumerate(encoder.blocks):
            for adapter in (block.attention_adapter, block.mlp_adapter):
                torch.nn.init.normal_(adapter.up.weight, std=0.5 if i == index else 0.0)
        with torch.no_grad():
            difference = (encoder(changed)[1] - encoder(x)[1]).abs().amax((2, 3, 4))  # (B, D)
        assert (difference[0, 2:5] > 1e-6).all(), f"block {index} does not reach the neighbours"
        assert difference[0, 0] == 0 and difference[0, 6] == 0, "two adapters reach two slices"
        assert (difference[1] == 0).all(), "another volume of the batch was touched"


def test_parameters_are_counted_by_part(small_sam: str) -> None:
    network = MaskSAM(tiny_config(backbone=small_sam), 1, 3)
    rows = {name: (total, trained) for name, total, trained in count_parameters(network)}
    assert rows["total"] == tuple(sum(r[i] for n, r in rows.items() if n != "total") for i in (0, 1))
    assert rows["stem"][0] == rows["stem"][1] and rows["image_encoder"][1] < rows["image_encoder"][0]


def test_a_checkpoint_of_another_config_is_refused_in_words() -> None:
    network = MaskSAM(tiny_config(), 1, 3)
    for changes in ({"num_queries": 5}, {"prompts": "hard"}):  # the second one has the same shapes
        with pytest.raises(WeightsError, match="=".join(map(str, *changes.items()))):
            network.load_state_dict(MaskSAM(tiny_config(**changes), 1, 3).state_dict())


@pytest.mark.parametrize("depth", [1, 3])
def test_an_adapter_trained_on_a_cpu_computes_the_depth_wise_convolution_of_pytorch(depth: int) -> None:
    adapter, x = DConvAdapter(16), torch.randn(2, depth, 5, 6, 16, requires_grad=True)
    nn.init.normal_(adapter.up.weight)

    def gradients(convolve: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x_down = adapter.act(adapter.down(x))
        y = adapter.up(x_down + adapter.act(adapter.norm(convolve(x_down))))
        return y, *torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])

    plain = gradients(lambda x: adapter.conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1))
    torch.testing.assert_close(gradients(adapter._convolve), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter(x), plain[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt")
def test_freed_memory_is_kept() -> None:
    code = """
import psutil, torch
from masksam_nnunet.modeling.compute import keep_freed_memory
grown = []
for _ in range(2):
    before = psutil.Process().memory_info().rss
    x = torch.ones(2**26)
    del x
    grown.append(psutil.Process().memory_info().rss - before)
    keep_freed_memory()
print(*grown)
"""
    first, second = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert first < 2**27 < second


def test_a_long_config_is_told_from_one_that_differs_in_its_end() -> None:
    ranges = [((0.0, 1.0),) * 99 + ((0.0, high),) for high in (1.0, 2.0)]
    ours, other = (MaskSAM(tiny_config(intensity_ranges=each), 100, 3) for each in ranges)
    assert ours.config.architecture[:448] == other.config.architecture[:448]
    ours.load_state_dict(ours.state_dict())
    with pytest.raises(WeightsError, match="ranges"):
        ours.load_state_dict(other.state_dict())
