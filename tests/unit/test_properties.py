"""Whatever a dataset asks for is built, trained for a step and predicted: shapes as promised, values finite."""

from __future__ import annotations

from dataclasses import replace

import torch
from configs import TINY_WIDTHS
from hypothesis import given, settings
from hypothesis import strategies as st

from masksam_nnunet.config import RESOLUTIONS, LossConfig, MaskSAMConfig
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.plans.architecture import unet_config

FLAGS = st.fixed_dictionaries(
    {
        "regions": st.booleans(),
        "checkpointing": st.booleans(),
        "encoder_adapters": st.booleans(),
        "prompts": st.sampled_from(("soft", "hard")),
        "resolution": st.sampled_from(RESOLUTIONS),
        "adapter_ratio": st.sampled_from((0.1, 0.25, 1.0)),
    }
)
LOSSES = st.builds(
    LossConfig,
    semantic=st.sampled_from((0.0, 1.0)),
    generator=st.sampled_from((0.0, 1.0)),
    num_points=st.sampled_from((7, 64, 2**15)),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[MaskSAMConfig, int, int, int, int | None]:
    """(config, B, C, K, ignore label)."""
    plane = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    depth = draw(st.one_of(st.none(), st.integers(1, 5)))
    patch = plane if depth is None else (depth, *plane)
    matching = draw(st.sampled_from(("class", "class", "class", "slice", "volume")))
    more = dict(TINY_WIDTHS)
    if matching == "class" and draw(st.booleans()):
        unet = unet_config((1.0,) * len(patch), patch, draw(st.booleans()))
        more["generator"] = replace(unet, features=(4,) * len(unet.features), blocks=(1,) * len(unet.features))
    config = MaskSAMConfig(
        backbone="tiny",
        patch_size=patch,
        matching=matching,
        num_queries=draw(st.integers(1, 3 if matching == "class" else 9)),
        loss=draw(LOSSES),
        **more,
        **draw(FLAGS),
    )
    classes = draw(st.integers(1 if config.regions else 2, 12))
    ignore = classes if draw(st.booleans()) else None
    return config, draw(st.integers(1, 2)), draw(st.integers(1, 5)), classes, ignore


def segmentation(config: MaskSAMConfig, batch: int, classes: int, ignore: int | None) -> torch.Tensor:
    """As nnU-Net's data loader gives it: labels, or a map a region and one of what is ignored."""
    if config.regions:
        channels = classes + (ignore is not None)
        return torch.randint(0, 2, (batch, channels, *config.patch_size)).short()
    highest = classes if ignore is None else classes + 1
    return torch.randint(0, highest, (batch, 1, *config.patch_size)).short()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases())
def test_one_step_and_a_prediction(case: tuple[MaskSAMConfig, int, int, int, int | None]) -> None:
    config, batch, channels, classes, ignore = case
    torch.manual_seed(0)
    network = MaskSAM(config, channels, classes, image_channels=1 + channels // 2)
    # In place of nnU-Net's loss, which has another for regions and ignores what it must.
    criterion = MaskSAMCriterion(config, classes, ignore, lambda logits, target: logits.square().mean())
    x = torch.randn(batch, channels, *config.patch_size)
    target = segmentation(config, batch, classes, ignore)
    output = network.train()(x)
    depth, height, width = network.grid.patch
    queries = config.queries(classes)
    assert output.class_logits.shape == (batch, depth, queries, classes + 1)
    assert output.mask_logits.shape == (batch, depth, queries, height, width)
    assert output.aux_mask_logits.shape == (batch, depth, queries, *network.grid.masks)
    boxes = output.aux_boxes
    assert boxes.shape == (batch, depth, queries, 4)
    assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[..., 2:] >= boxes[..., :2]).all()
    assert all(x.shape[:2] == (batch, classes) for x in output.class_maps)
    assert bool(output.class_maps) == config.anchored
    loss, terms = criterion(output, target)
    assert torch.isfinite(loss) and all(torch.isfinite(term) for term in terms.values())
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    optimizer.step()

    with torch.no_grad():
        prediction = network.eval()(x)
    assert prediction.shape == (batch, classes, *config.patch_size)
    assert torch.isfinite(prediction).all()
    if not config.regions:
        torch.testing.assert_close(prediction.exp().sum(1), torch.ones(batch, *config.patch_size), atol=1e-4, rtol=0)
