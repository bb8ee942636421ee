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


def step(model: nn.Module, guard: FiniteGuard, optimizer: torch.optim.Optimizer, number: int, x: Tensor) -> None:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    guard.checked(loss).backward()
    bad, norms = guard.clip(1.0)
    guard.step(optimizer, bad)
    guard.note(Iteration(number, 0.1, {"data": x}, loss.detach(), {"only": loss.detach()}, bad, norms))


def data(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_training_is_what_it_were_without_the_bad_batches(
    cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    bad = {0, 2, 3}
    trained = []
    for left_out in (False, True):
        model = network()
        guard = FiniteGuard({name: list(part.parameters()) for name, part in model.named_children()}, limit=100)
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
