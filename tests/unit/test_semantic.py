"""The semantic output by hand, and as nnU-Net reads it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from masksam_nnunet.semantic import semantic_log_probabilities, union_logits


def test_by_hand() -> None:
    classes = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])  # two queries; background, organ, no object
    masks = torch.tensor([0.9, 0.5])
    organ = 0.3 * 0.9 + 0.8 * 0.5
    background = 0.6 * 0.9 + 0.1 * 0.5 + (1 - 0.9 * 0.9) * (1 - 0.9 * 0.5)  # the last: nothing is there
    logits = semantic_log_probabilities(classes.log()[None, None], masks.logit().reshape(1, 1, 2, 1, 1), False, False)
    wanted = torch.tensor([background, organ]) / (organ + background)
    torch.testing.assert_close(logits.exp().flatten(), wanted, atol=1e-4, rtol=0)


def test_what_nothing_covers_is_background() -> None:
    log_p = semantic_log_probabilities(torch.randn(1, 2, 3, 5), torch.full((1, 2, 3, 4, 4), -40.0), False, False)
    assert (log_p.argmax(1) == 0).all() and (log_p[:, 0].exp() > 0.999).all()


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_softmax_of_it_is_the_probability(scale: float, anchored: bool) -> None:
    queries = scale * torch.randn(2, 3, 6, 4), scale * torch.randn(2, 3, 6, 5, 6)
    log_p = semantic_log_probabilities(*queries, False, anchored)
    assert log_p.shape == (2, 3, 3, 5, 6)
    torch.testing.assert_close(log_p.softmax(1), log_p.exp())


def test_free_queries_of_regions_are_joined_as_independent_events() -> None:
    classes, masks = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 5, 6)
    shares = torch.einsum("bdnk,bdnhw->bdnkhw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    logits = semantic_log_probabilities(classes, masks, True, False)
    torch.testing.assert_close(logits.sigmoid(), (1 - (1 - shares).prod(2)).transpose(1, 2))


@pytest.mark.parametrize("regions", [False, True])
def test_anchored_queries_speak_for_their_own_class(regions: bool) -> None:
    """Two queries for each of three classes; a query is there with the probability of its class."""
    classes, masks = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 5, 6)
    own = F.one_hot(torch.arange(6) // 2, 4).bool()
    there = classes.softmax(-1)[:, :, own]  # (1, 2, 6)
    result = semantic_log_probabilities(classes, masks, regions, True)
    if regions:
        log_there = there.log()[..., None, None]
        alone = (masks + log_there).sigmoid().unflatten(2, (3, 2))
        torch.testing.assert_close(result.sigmoid(), (1 - (1 - alone).prod(3)).transpose(1, 2))
    else:
        scores = (masks.sigmoid() * there[..., None, None]).unflatten(2, (3, 2)).sum(3)
        torch.testing.assert_close(result.exp(), (scores / scores.sum(2, keepdim=True)).transpose(1, 2))


def test_the_union_of_one_query_is_itself_and_that_of_many_a_noisy_or() -> None:
    logits = torch.randn(2, 6, 3)
    assert union_logits(logits, 6, dim=1) is logits
    joined = 1 - (1 - logits.sigmoid()).unflatten(1, (2, 3)).prod(2)
    torch.testing.assert_close(union_logits(logits, 2, dim=1).sigmoid(), joined)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 100.0])
def test_the_gradient_is_finite_and_small_where_queries_meet(regions: bool, anchored: bool, size: float) -> None:
    """Two queries for each of two classes, each of them for or against in all combinations.

    The gradient of a clamped sum was 40,000 just below 1, and nothing above.
    """
    masks = torch.stack(torch.meshgrid(*[torch.tensor([-size, size])] * 4, indexing="ij"))
    masks = masks.reshape(1, 1, 4, 4, 4).requires_grad_()
    for certain in (0.0, 1.0, 100.0):
        classes = torch.tensor([[certain, 0.0, 0.0]] * 2 + [[0.0, certain, 0.0]] * 2)[None, None].requires_grad_()
        result = semantic_log_probabilities(classes, masks, regions, anchored)
        assert result.isfinite().all()
        truth = torch.zeros_like(result).index_fill_(1, torch.tensor(1), 1.0)
        loss = F.binary_cross_entropy_with_logits(result, truth) if regions else -result[:, 1].mean()
        gradients = torch.autograd.grad(loss, (classes, masks))
        assert all(gradient.isfinite().all() and gradient.abs().max() <= 1 for gradient in gradients)
        if certain < 100 and size < 100:  # where all are against, a missed class is still learned
            assert gradients[1][0, 0, 2:, 0, 0].all()
