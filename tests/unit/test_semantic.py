"""The semantic output by hand, and as nnU-Net reads it."""

from __future__ import annotations

import pytest
import torch

from masksam_nnunet.semantic import semantic_log_probabilities


def test_by_hand() -> None:
    classes = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])  # two queries; background, organ, no object
    masks = torch.tensor([0.9, 0.5])
    organ = 0.3 * 0.9 + 0.8 * 0.5
    background = 0.6 * 0.9 + 0.1 * 0.5
    background += max(0.0, 1 - organ - background)
    logits = semantic_log_probabilities(classes.log()[None, None], masks.logit().reshape(1, 1, 2, 1, 1))
    wanted = torch.tensor([background, organ]) / (organ + background)
    torch.testing.assert_close(logits.exp().flatten(), wanted, atol=1e-4, rtol=0)


def test_what_nothing_covers_is_background() -> None:
    log_p = semantic_log_probabilities(torch.randn(1, 2, 3, 5), torch.full((1, 2, 3, 4, 4), -40.0))
    assert (log_p.argmax(1) == 0).all() and (log_p[:, 0].exp() > 0.999).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_softmax_of_it_is_the_probability_and_float16_holds_it(scale: float) -> None:
    log_p = semantic_log_probabilities(scale * torch.randn(2, 3, 4, 4), scale * torch.randn(2, 3, 4, 5, 6))
    assert log_p.shape == (2, 3, 3, 5, 6)
    torch.testing.assert_close(log_p.softmax(1), log_p.exp())
    assert torch.isfinite((log_p * 10 * 64).half()).all()  # nnU-Net sums windows, weighted up to 10, in float16


def test_regions_are_independent_scores() -> None:
    classes = torch.randn(1, 2, 4, 3)
    masks = torch.randn(1, 2, 4, 5, 6)
    scores = torch.einsum("bdnk,bdnhw->bkdhw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    logits = semantic_log_probabilities(classes, masks, regions=True)
    torch.testing.assert_close(logits.sigmoid(), scores.clamp(1e-6, 1 - 1e-6))
