"""Every fast path against its plain form, values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from configs import PAPER, UNET, loss_config, tiny_config
from plain_form import PlainCriterion, plain_parts
from torch import Tensor

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.config import Grid
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput
from masksam_nnunet.modeling import network as network_module

K = 4


@pytest.fixture(autouse=True)
def _narrow_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    """``vit_l`` is narrow, with windows and global blocks."""
    narrow = replace(
        BACKBONES["vit_l"],
        width=32,
        depth=5,
        heads=2,
        global_blocks=(0, 2, 3, 4),
        window=3,
        prompt_width=64,
        decoder_mlp=64,
        decoder_heads=4,
    )
    monkeypatch.setitem(BACKBONES, "vit_l", narrow)


def outputs(grid: Grid, batch: int, queries: int) -> MaskSAMOutput:
    depth, height, width = grid.patch
    corner = torch.rand(batch, queries, depth, 2) * 0.5
    fields = (
        torch.randn(batch, queries, depth, K + 1),
        3 * torch.randn(batch, queries, depth, height, width),
        3 * torch.randn(batch, queries, depth, *grid.masks),
        torch.cat([corner, corner + 0.1 + torch.rand_like(corner) * 0.4], -1),
    )
    return MaskSAMOutput(*(x.transpose(1, 2).requires_grad_() for x in fields))


def labels(grid: Grid, batch: int) -> Tensor:
    depth, height, width = grid.patch
    coarse = torch.randint(0, K, (batch, 1, depth, 3, 4))
    coarse[0, 0, 0] = 0  # a slice of background
    return coarse.repeat_interleave(-(-height // 3), 3).repeat_interleave(-(-width // 4), 4)[..., :height, :width]


@pytest.mark.parametrize("resolution", [1, 4])
def test_targets_matching_and_loss_equal_loops_over_slices(resolution: int) -> None:
    config = tiny_config(patch_size=(3, 20, 24), resolution=resolution, loss=loss_config(), **PAPER)
    grid = Grid.of(config)
    output, truth = outputs(grid, batch=2, queries=6), labels(grid, batch=2)
    results = []
    for judge in (MaskSAMCriterion(config, K), PlainCriterion(config, K)):
        total, terms = judge(output, truth)
        gradients = torch.autograd.grad(total, output[:4])
        results.append((total, {name: term.detach() for name, term in terms.items()}, gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("frozen", "changes", "slices_at_once"),
    [
        (True, {}, None),
        (False, {}, None),
        (True, {"checkpointing": True}, 1),
        (False, {"checkpointing": True}, None),
        (True, {"prompts": "hard", "num_queries": 1}, 4),
    ],
)
def test_the_network_equals_its_plain_form(
    frozen: bool, changes: dict[str, object], slices_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow SAM with windows, on a grid that is not square and that windows do not divide."""
    config = tiny_config(**{"backbone": "vit_l", "patch_size": (3, 20, 28), "resolution": 4, **PAPER, **changes})
    network = MaskSAM(config, 2, K).train()
    network.image_encoder.slices_at_once = slices_at_once
    monkeypatch.setattr(network_module, "TOKENS_PER_CHUNK", 2 * 6 * 5 * 7)  # two queries
    if not frozen:
        network.requires_grad_(True)
    with torch.no_grad():
        for parameter in network.parameters():  # nothing stays at zero
            parameter += 0.05 * torch.randn_like(parameter)
    x = torch.randn(2, 2, 3, 20, 28)
    results = []
    for compute in (network, lambda x: plain_parts(network, x)):
        network.zero_grad()
        output = compute(x)
        sum(field.float().square().mean() for field in output[:4]).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results.append((dict(output._asdict()), gradients))
    (ours, our_gradients), (plain, plain_gradients) = results
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, expected in plain_gradients.items():
        largest = float(expected.abs().max())
        torch.testing.assert_close(our_gradients[name], expected, atol=1e-4 * largest + 1e-7, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({"patch_size": (3, 20, 28), "checkpointing": True}, True),
        ({"patch_size": (3, 16, 32), "generator": UNET}, True),
        ({"patch_size": (20, 28), **PAPER}, False),
    ],
)
def test_torch_compile_finds_no_graph_break(changes: dict[str, object], training: bool) -> None:
    network = MaskSAM(tiny_config(backbone="vit_l", resolution=2, **changes), 1, K)
    x = torch.randn(1, 1, *network.config.patch_size)
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        found = torch._dynamo.explain(network.train(training))(x)
    assert found.graph_break_count == 0 and found.graph_count == 1, found.break_reasons
    torch._dynamo.reset()


def test_low_precision_is_as_near_as_the_plain_forms() -> None:
    """Under autocast, which on a CPU has PyTorch's fused attention instead of blocks, as a GPU has."""
    config = tiny_config(backbone="vit_l", patch_size=(3, 20, 28), resolution=4, loss=loss_config(), **PAPER)
    network = MaskSAM(config, 1, K).train()
    x = torch.randn(2, 1, 3, 20, 28)
    exact = plain_parts(network, x)
    for compute in (network, lambda x: plain_parts(network, x)):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = compute(x)
        for field, expected in zip(output[:4], exact[:4], strict=True):
            assert (field.float() - expected).abs().mean() < 0.03 * expected.abs().mean()
        MaskSAMCriterion(config, K)(output, labels(network.grid, 2))[0].backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_frozen_linear_maps_may_be_stored_as_autocast_rounds_them() -> None:
    network = MaskSAM(tiny_config(backbone="vit_l", patch_size=(3, 20, 28), resolution=2), 1, K).train()
    x = torch.randn(1, 1, 3, 20, 28)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(x)
        assert network.store_frozen(torch.bfloat16) > 0
        torch.testing.assert_close(network(x)[:4], before[:4], rtol=0, atol=0)
