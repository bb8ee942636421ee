"""The loss: values by hand, and the cases that break losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from configs import PAPER, loss_config, tiny_config
from torch import Tensor

from masksam_nnunet.config import Grid, MaskSAMConfig
from masksam_nnunet.losses import masks as masks_module
from masksam_nnunet.losses.criterion import DECODER_DICE, MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAMOutput
from masksam_nnunet.modeling.network import FOREIGN

K, N, D, H, W = 3, 5, 2, 16, 24
FORMS: dict[str, dict[str, Any]] = {
    "class": {},
    "two of a class": {"num_queries": 2},
    "slice": PAPER,
    "volume": {**PAPER, "matching": "volume"},
}


def config_of(form: str, **changes: Any) -> MaskSAMConfig:
    """Masks have the patch's size before they are resized, too."""
    loss = {name: changes.pop(name) for name in list(changes) if name not in ("regions", "patch_size")}
    return tiny_config(**{"patch_size": (D, H, W), "resolution": 4, **FORMS[form], **changes}, loss=loss_config(**loss))


def criterion(form: str = "slice", ignore_label: int | None = None, **loss: Any) -> MaskSAMCriterion:
    return MaskSAMCriterion(config_of(form, **loss), K, ignore_label)


GRID = Grid.of(config_of("slice"))


def labels(batch: int = 2) -> Tensor:
    seg = torch.zeros(batch, 1, D, H, W, dtype=torch.int16)
    seg[:, :, :, 3:9, 4:12] = 1
    seg[:, :, :, 10:14, 14:20] = 2
    return seg


def outputs(form: str = "slice", batch: int = 2) -> MaskSAMOutput:
    number = {"class": K, "two of a class": 2 * K}.get(form, N)
    corner = torch.rand(batch, D, number, 2) * 0.5
    return MaskSAMOutput(
        torch.randn(batch, D, number, K + 1).requires_grad_(),
        torch.randn(batch, D, number, H, W).requires_grad_(),
        torch.randn(batch, D, number, *GRID.masks).requires_grad_(),
        torch.cat([corner, corner + 0.1 + torch.rand_like(corner) * 0.4], -1).requires_grad_(),
    )


def sure_of_their_classes(masks: Tensor, maps: Tensor) -> MaskSAMOutput:
    """Anchored queries with masks (B, K, D, H, W), and the finest of the generator's maps."""
    own = torch.eye(K).bool()
    classes = F.pad(torch.where(own, 6.0, FOREIGN), (0, 1)).expand(len(masks), masks.shape[2], K, K + 1)
    empty = torch.zeros(len(masks), masks.shape[2], K, 4)
    return MaskSAMOutput(classes, masks.transpose(1, 2), masks.transpose(1, 2), empty, (maps,))


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


@pytest.mark.parametrize("form", FORMS)
def test_ignored_voxels_have_no_say(form: str) -> None:
    seg = labels()
    seg[:, :, :, 3:6, :] = 7
    output = outputs(form)
    judge = criterion(form, ignore_label=7)
    total, _ = judge(output, seg)
    total.backward()
    assert (output.mask_logits.grad[..., 3:6, :] == 0).all()
    changed = output._replace(mask_logits=output[1].detach().clone(), aux_mask_logits=output[2].detach().clone())
    changed.mask_logits[..., 3:6, :] += 5
    changed.aux_mask_logits[..., 3:6, :] -= 5
    torch.testing.assert_close(judge(changed, seg)[0], total)


def test_a_box_that_may_reach_ignored_voxels_must_only_hold_what_is_labelled() -> None:
    """A larger box costs nothing and a cut what it cuts; slices without ignored voxels keep all of the loss."""
    seg = labels(batch=1)[:, :, :1].repeat(1, 1, D, 1, 1)
    seg[:, :, 0, 0, 0] = 7
    whole = torch.tensor([[0, 0, W, H], [4, 3, 12, 9], [14, 10, 20, 14]])  # of the three classes
    factor = torch.tensor([1 / W, 1 / H, 1 / W, 1 / H])
    output = outputs("class", batch=1)
    judge = criterion("class", ignore_label=7)
    for change, costs in (((-2, -1, 2, 1), (0, 1)), ((1, 0, 0, 0), (1, 1))):
        changed = (whole[1] + torch.tensor(change)) * factor
        for slice_, cost in enumerate(costs):
            boxes = (whole * factor).repeat(D, 1, 1)
            boxes[slice_, 1] = changed
            boxes.requires_grad_()
            _, terms = judge(output._replace(aux_boxes=boxes[None]), seg)
            distance = (changed - whole[1] * factor).abs().sum() / (K * D)
            torch.testing.assert_close(terms["box_l1"], cost * distance)
            assert (terms["box_giou"] > 1e-3) == (slice_ == 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", ["background", "ignored", "half"])
def test_empty_slices_give_a_finite_loss_and_gradient(content: str, form: str) -> None:
    seg = torch.zeros(2, 1, D, H, W)
    if content == "ignored":
        seg[:] = 7
    if content == "half":
        seg[0] = 7
    output = outputs(form)
    total, terms = criterion(form, ignore_label=7)(output, seg)
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(t) for t in terms.values())
    assert all(torch.isfinite(x.grad).all() for x in output[:4] if x.grad is not None)
    if content == "ignored":
        assert float(total) == 0


def test_sampled_points_estimate_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "QUOTA", 0.0)
    seg, output = labels(), outputs()
    exact = criterion()(output, seg)[1]
    sampled = criterion(num_points=300, uncertain_fraction=0.0)
    means = torch.stack([sampled(output, seg)[1]["mask_bce"] for _ in range(30)]).mean()
    assert float(means) == pytest.approx(float(exact["mask_bce"]), rel=0.05)


@pytest.mark.parametrize("form", ["class", "slice"])
def test_a_tiny_target_that_is_missed_with_confidence_is_matched_and_learned(form: str) -> None:
    """5 voxels of 512 x 512: points drawn anywhere meet none of them in most steps."""
    config = config_of(form, patch_size=(512, 512))
    seg = torch.zeros(1, 1, 512, 512)
    seg[..., 200, 100:105] = 1
    masks = torch.full((1, 1, 4, 512, 512), -8.0)
    masks[:, :, 0] = 8
    if form == "slice":  # one of three free queries finds it; the classes say nothing
        masks[:, :, 2, 200, 100:105] = 8
    masks = masks[:, :, : config.queries(2)].requires_grad_()
    queries = masks.shape[2]
    classes, boxes = torch.zeros(1, 1, queries, 3), torch.zeros(1, 1, queries, 4)
    output = MaskSAMOutput(classes, masks, torch.zeros(1, 1, queries, *Grid.of(config).masks), boxes)
    judge = MaskSAMCriterion(config, 2)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(judge(output, seg)[0], masks)
        assert (gradient[0, 0, 2 if form == "slice" else 1, 200, 100:105] < 0).all()


def semantic_loss(log_p: Tensor, target: Tensor) -> Tensor:
    """In place of nnU-Net's."""
    assert target.shape[2:] == log_p.shape[2:] and len(target) == len(log_p)
    if target.shape[1] > 1:
        return F.binary_cross_entropy_with_logits(log_p, target[:, :K].float())
    return F.cross_entropy(log_p, target[:, 0].long())


def test_the_semantic_loss_is_added_with_its_weight() -> None:
    seg, output = labels(), outputs()
    base, _ = criterion()(output, seg)
    judge = MaskSAMCriterion(config_of("slice", semantic=0.5), K, semantic_loss=semantic_loss)
    total, terms = judge(output, seg)
    torch.testing.assert_close(total, base + 0.5 * terms["semantic"])
    assert not {"generator", DECODER_DICE} & terms.keys()  # the paper's form has no class maps
    with pytest.raises(ValueError, match=r"loss\.semantic = 0\.5"):
        MaskSAMCriterion(config_of("slice", semantic=0.5), K)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_the_generator_has_nnunets_loss_at_all_its_strides(regions: bool, flat: bool) -> None:
    """Halved from one to the next; labels are those of the nearest voxel."""
    seg = labels()
    seg = torch.cat([seg == c for c in range(K)], dim=1) if regions else seg
    depths = (1, 1, 1) if flat else (2, 2, 1)
    if flat:
        seg = seg[:, :, 0]
    maps = [torch.randn(2, K, d, H // 2**i, W // 2**i, requires_grad=True) for i, d in enumerate(depths)]
    output = outputs("class")
    if flat:
        output = output.changed(lambda x: x[:, :1])
    output = output._replace(class_maps=tuple(maps))
    config = config_of("class", regions=regions, generator=0.5, patch_size=(H, W) if flat else (D, H, W))
    total, terms = MaskSAMCriterion(config, K, semantic_loss=semantic_loss)(output, seg)
    by_hand = 0.0
    for logits, step, weight in zip(maps, (1, 2, 4), (4, 2, 1), strict=True):
        truth = seg[..., step // 2 :: step, step // 2 :: step]
        if flat:
            logits = logits[:, :, 0]
        elif step == 4:
            truth = truth[:, :, 1:]
        by_hand = by_hand + weight / 7 * semantic_loss(logits, truth)
    torch.testing.assert_close(terms["generator"], by_hand)
    without, _ = MaskSAMCriterion(config, K)(output, seg)
    torch.testing.assert_close(total, without + 0.5 * by_hand)
    assert all(grad.any() for grad in torch.autograd.grad(total, maps))


@pytest.mark.parametrize("ignore_label", [None, K])
@pytest.mark.parametrize("regions", [False, True])
def test_what_the_decoder_adds_to_the_dice_by_hand(regions: bool, ignore_label: int | None) -> None:
    """Class 2 is in no known voxel, and so counts nowhere; the first one counts with regions only."""
    truth, found, start = (torch.randint(0, 2, (2, D, H, W)) for _ in range(3))
    known = torch.ones_like(truth, dtype=torch.bool)
    if ignore_label is not None:
        known = torch.rand(truth.shape) < 0.7
        start = torch.where(known, start, 2)

    def dice(predicted: Tensor, c: int) -> float:
        a, b = ((x == c) & known for x in (predicted, truth))
        return float(2 * (a & b).sum() / (a.sum() + b.sum()))

    def maps(x: Tensor) -> Tensor:
        return 10.0 * F.one_hot(x, K).movedim(-1, 1) - 5

    seg = torch.where(known, truth, K)[:, None]
    if regions:
        seg = torch.cat([truth[:, None] == c for c in range(K)] + [~known[:, None]] * (ignore_label is not None), 1)
    counted = (0, 1) if regions else (1,)
    judge = MaskSAMCriterion(
        config_of("class", regions=regions, semantic=1.0), K, ignore_label, lambda logits, _: logits.mean()
    )
    total, terms = judge(sure_of_their_classes(maps(found), maps(start)), seg)
    wanted = sum(dice(found, c) - dice(start, c) for c in counted) / len(counted)
    assert float(terms.pop(DECODER_DICE)) == pytest.approx(wanted, abs=1e-6)
    weights = judge.loss
    parts = [getattr(weights, "class_weight" if name == "class" else name) * term for name, term in terms.items()]
    torch.testing.assert_close(total, sum(parts))  # it is no part of the loss
