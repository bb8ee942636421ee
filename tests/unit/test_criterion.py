"""The loss: values by hand, gradients by finite differences, and the cases that break losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from configs import loss_config, tiny_config
from torch import Tensor

from masksam_nnunet.config import Grid
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.losses.masks import uncertain_points
from masksam_nnunet.modeling import MaskSAMOutput

K, N, D, H, W = 3, 5, 2, 16, 24
GRID = Grid.of(tiny_config(patch_size=(D, H, W), resolution=4))  # masks are 16x24 too


def criterion(regions: bool = False, ignore_label: int | None = None, **loss: object) -> MaskSAMCriterion:
    return MaskSAMCriterion(loss_config(**loss), GRID, K, regions, ignore_label)


def labels(batch: int = 2) -> Tensor:
    seg = torch.zeros(batch, 1, D, H, W, dtype=torch.int16)
    seg[:, :, :, 3:9, 4:12] = 1
    seg[:, :, :, 10:14, 14:20] = 2
    return seg


def outputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> MaskSAMOutput:
    corner = torch.rand(batch, D, N, 2, dtype=dtype) * 0.5
    return MaskSAMOutput(
        torch.randn(batch, D, N, K + 1, dtype=dtype).requires_grad_(),
        torch.randn(batch, D, N, H, W, dtype=dtype).requires_grad_(),
        torch.randn(batch, D, N, *GRID.masks, dtype=dtype).requires_grad_(),
        torch.cat([corner, corner + 0.1 + torch.rand_like(corner) * 0.4], -1).requires_grad_(),
    )


def test_terms_by_hand_for_one_query_and_one_target() -> None:
    seg = torch.ones(1, 1, D, H, W)
    output = MaskSAMOutput(
        torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, D, 1, 4),
        torch.full((1, D, 1, H, W), 0.5),
        torch.full((1, D, 1, *GRID.masks), -0.5),
        torch.tensor([0.1, 0.0, 1.0, 1.0]).expand(1, D, 1, 4),
    )
    total, terms = criterion()(output, seg)
    p, area = torch.tensor(0.5).sigmoid(), H * W
    expected = {
        "class": -torch.tensor([0.0, 1.0, 0.0, 0.0]).log_softmax(0)[1],
        "mask_bce": -p.log(),
        "mask_dice": 1 - (2 * p * area + 1) / (p * area + area + 1),
        "aux_bce": -(1 - p).log(),
        "aux_dice": 1 - (2 * (1 - p) * area + 1) / ((1 - p) * area + area + 1),
        "box_l1": torch.tensor(0.1),
        "box_giou": torch.tensor(0.1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
    weights = {"class": 0.2, "mask_bce": 1.5, "mask_dice": 1.5, "aux_bce": 0.5, "aux_dice": 0.5, "box_l1": 0.5}
    torch.testing.assert_close(total, sum(weights.get(n, 0.2) * v for n, v in expected.items()))


def test_ignored_voxels_have_no_say() -> None:
    seg = labels()
    seg[:, :, :, 3:6, :] = 7
    output = outputs()
    judge = criterion(ignore_label=7)
    total, _ = judge(output, seg)
    total.backward()
    assert (output.mask_logits.grad[..., 3:6, :] == 0).all()
    changed = MaskSAMOutput(output[0], output[1].detach().clone(), output[2].detach().clone(), output[3])
    changed.mask_logits[..., 3:6, :] += 5
    changed.aux_mask_logits[..., 3:6, :] -= 5
    torch.testing.assert_close(judge(changed, seg)[0], total)


@pytest.mark.parametrize("matching", ["slice", "volume"])
@pytest.mark.parametrize("content", ["background", "ignored", "half"])
def test_empty_slices_give_a_finite_loss_and_gradient(content: str, matching: str) -> None:
    seg = torch.zeros(2, 1, D, H, W)
    if content == "ignored":
        seg[:] = 7
    if content == "half":
        seg[0] = 7
    output = outputs()
    total, terms = criterion(ignore_label=7, matching=matching)(output, seg)
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(t) for t in terms.values())
    assert all(torch.isfinite(x.grad).all() for x in output if x.grad is not None)
    if content == "ignored":
        assert float(total) == 0


def test_sampled_points_estimate_the_whole_and_prefer_what_is_uncertain() -> None:
    seg = labels()
    output = outputs()
    exact = criterion()(output, seg)[1]
    sampled = criterion(num_points=300, uncertain_fraction=0.0)
    means = torch.stack([sampled(output, seg)[1]["mask_bce"] for _ in range(30)]).mean()
    assert float(means) == pytest.approx(float(exact["mask_bce"]), rel=0.05)
    logits = output.mask_logits.detach().flatten(3)
    pairs = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 4])
    points = uncertain_points(logits, pairs, None, 64, oversample=2.0, fraction=0.75)
    assert points.shape == (3, 64)
    values = logits.flatten(0, 1)[pairs].gather(1, points).abs()
    assert values[:, :48].mean() < 0.75 * values[:, 48:].mean()


def test_the_semantic_loss_is_added_with_its_weight() -> None:
    seg = labels()
    output = outputs()

    def semantic_loss(log_p: Tensor, target: Tensor) -> Tensor:
        assert log_p.shape == (2, K, D, H, W) and target.shape == seg.shape
        return F.nll_loss(log_p, target[:, 0].long())

    base, _ = criterion()(output, seg)
    judge = MaskSAMCriterion(loss_config(semantic=0.5), GRID, K, semantic_loss=semantic_loss)
    total, terms = judge(output, seg)
    torch.testing.assert_close(total, base + 0.5 * terms["semantic"])
    with pytest.raises(ValueError, match=r"loss\.semantic = 0\.5"):
        MaskSAMCriterion(loss_config(semantic=0.5), GRID, K)
