"""Steps that are left out by the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masksam_nnunet.trainers.finite_guard import FiniteGuard, Iteration, ready_to_skip

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"weight_decay": 0.01}),
    (torch.optim.SGD, {"weight_decay": 0.01, "momentum": 0.99, "nesterov": True}),
    (torch.optim.SGD, {}),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))


def guard_of(model: nn.Sequential, limit: int = 100) -> FiniteGuard:
    return FiniteGuard({name: list(part.parameters()) for name, part in model.named_children()}, limit)


def step(model: nn.Module, guard: FiniteGuard, optimizer: torch.optim.Optimizer, number: int, x: Tensor) -> None:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    guard.checked(loss).backward()
    bad, norms = guard.clip(1.0)
    guard.step(optimizer, bad)
    guard.note(bad, Iteration(number, 0.1, {"data": x}, loss.detach(), {"only": loss.detach()}, norms))


def data(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("bad", [{0}, {2, 3}, {0, 1, 4}])
def test_a_training_is_what_it_were_without_the_bad_batches(
    cls: type[torch.optim.Optimizer], options: dict[str, Any], bad: set[int]
) -> None:
    trained = []
    for left_out in (False, True):
        model = network()
        guard = guard_of(model)
        optimizer = ready_to_skip(cls(model.parameters(), lr=0.1, fused=True, **options))  # type: ignore[call-arg]
        for number in range(6):
            if number in bad and not left_out:
                step(model, guard, optimizer, number, data(number).fill_(torch.inf))
            elif number not in bad:
                step(model, guard, optimizer, number, data(number))
        guard.new_reports()
        assert guard.skipped == (0 if left_out else len(bad))
        trained.append(list(model.parameters()))
    for one, other in zip(*trained, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


def test_clipping_is_pytorchs() -> None:
    for scale in (1.0, 1000.0):
        ours, theirs = network(), network()
        guard = guard_of(ours)
        for model in (ours, theirs):
            (model(data(0)).square().mean() * scale).backward()
        bad, norms = guard.clip(12.0)
        total = nn.utils.clip_grad_norm_(theirs.parameters(), 12.0)
        assert bad == 0
        torch.testing.assert_close(torch.linalg.vector_norm(norms), total)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_each_is_told_of_once_and_the_row_is_counted() -> None:
    model = network()
    guard = guard_of(model, limit=2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    told = []
    for number, good in enumerate([True, False, True, False, False]):
        x = data(number)
        if not good:
            x[1, 2] = torch.nan
        step(model, guard, optimizer, number, x)
        told.append(guard.new_reports())
        assert guard.too_many == (number == 4)
    assert [len(lines) for lines in told] == [0, 1, 0, 1, 1]
    assert told[1][0].startswith("iteration 1, learning rate 0.1: loss nan (terms that are not finite: only nan)")
    assert told[4][0].endswith("cases: 0, 1, 2; the input holds values that are not finite in 1")
    assert guard.skipped == 3
