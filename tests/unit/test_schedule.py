"""Warm-up and polynomial decay."""

from __future__ import annotations

import pytest
import torch

from masksam_nnunet.trainers.schedule import WarmupPolyLR


def test_rates() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=9.0)
    schedule = WarmupPolyLR(optimizer, 0.1, num_epochs=10, warmup_iterations=4)
    assert [schedule.at(0.0, i) for i in range(5)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert schedule.at(0.5, 100) == pytest.approx(0.1 * 0.5**0.9)
    assert schedule.at(1.0, 100) == 0
    schedule.step(2)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * 0.8**0.9] * 2)
