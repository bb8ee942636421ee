"""`torch.compile` of MaskSAM: results as without it, no graph break, and nothing is compiled twice. Takes minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_plans import batch, dataset_json, folders, plain_plans, simple_cost

from masksam_nnunet import trainers
from masksam_nnunet.plans import architecture

pytestmark = pytest.mark.long
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("MaskSAMTrainer_tiny", (2, 64, 64)),
        ("MaskSAMTrainer_tiny", (64, 64)),
        ("MaskSAMTrainer_lite_medsam", (2, 64, 64)),
    ],
)
def test_compiled_steps_are_those_of_the_plain_network(
    name: str, patch: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)

    def make() -> Any:
        torch.manual_seed(0)
        made = getattr(trainers, name)(plain_plans(patch), "3d_fullres", 0, dataset_json(), CPU)
        made.initialize()
        made.on_train_epoch_start()
        return made

    plain, compiled = make(), make()
    compiled.network = torch.compile(compiled.network, fullgraph=True)
    given = batch(plain)

    def losses(made: Any) -> list[float]:
        steps = made.train_step, made.validation_step
        made.network.train()
        first = float(steps[0](given)["loss"])
        made.network.eval()
        with torch.no_grad():
            made.network(given["data"][:1])  # as sliding windows may come
            return [first, float(steps[1](given)["loss"])]

    first = [losses(made) for made in (plain, compiled)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        more = [losses(made) for made in (plain, compiled)]
    for ours, theirs in (first, more):
        assert theirs == pytest.approx(ours, rel=1e-3)
    assert first[0] != more[0]
