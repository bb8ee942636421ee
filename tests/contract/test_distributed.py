"""Two ranks over gloo: no unused parameters, equal parameters after a step, losses normalised over ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from configs import UNET, loss_config
from plain_plans import dataset_json, folders, tiny_plans
from torch.nn.parallel import DistributedDataParallel

from masksam_nnunet import trainers
from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.environment import BUDGET_MINUTES
from masksam_nnunet.trainers import MaskSAMTrainer, MaskSAMTrainer_tiny, MaskSAMTrainer_tiny_budget
from masksam_nnunet.trainers.resumable import ResumableTrainer

MINUTES, SAVING = 0.02, 4.0  # of a budget; seconds
RELATED = ("MASAMTrainer", "HSAMTrainer", "AutoSAMPromptTrainer")
"""Between them: additions to the encoder, two stages, and classes that are decoded again in the backward pass."""


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two whose halves hold very different numbers of targets."""
    torch.manual_seed(5)
    x = torch.randn(2, 1, 4, 32, 32)
    y = torch.zeros(2, 1, 4, 32, 32)
    y[1, :, 1:, 4:20, 4:20] = 1
    y[1, :, 2:, 20:30, 20:30] = 2
    return x, y


def make_trainer(cls: type[MaskSAMTrainer] = MaskSAMTrainer_tiny, **form: Any) -> Any:
    torch.manual_seed(1)
    trainer = cls(tiny_plans(form=form), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_epoch_start()
    return trainer


class Loader:
    """A batch again and again; after some, this rank is asked to leave, or finds what cannot be trained on."""

    def __init__(self, rank: int, trainer: MaskSAMTrainer_tiny) -> None:
        self.rank, self.trainer = rank, trainer

    def __next__(self) -> dict[str, torch.Tensor]:
        x, y = (value[self.rank : self.rank + 1].clone() for value in data())
        if self.trainer.iteration == 2 and self.rank == 1:
            x[:] = torch.nan  # its gradient is all ranks'
        if self.trainer.iteration == 3 and self.rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        return {"data": x, "target": y}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Before the group exists: nnU-Net would ask for CUDA.
    trainer, unet = make_trainer(loss=loss_config()), make_trainer(generator=UNET)
    os.environ[BUDGET_MINUTES] = str(MINUTES)
    budget = make_trainer(MaskSAMTrainer_tiny_budget)
    related = [make_trainer(getattr(trainers, name)) for name in RELATED]
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    for made in (trainer, unet, *related):
        made.is_ddp, made.local_rank = True, rank
        made.network = DistributedDataParallel(made.network)
    budget.is_ddp, budget.local_rank, budget._agreeing = True, rank, dist.new_group(backend="gloo")
    x, y = data()
    half = {"data": x[rank : rank + 1], "target": y[rank : rank + 1]}
    outputs = [trainer.train_step(dict(half)) for _ in range(2)]
    gradients = {n: p.grad for n, p in trainer.sam_network.named_parameters() if p.grad is not None}
    for made in related:
        made.train_step(dict(half))
        made.train_step(dict(half))  # fails where the first left a parameter without a gradient
    states = [dict(made.sam_network.named_parameters()) for made in (trainer, *related)]
    torch.save((gradients, states), Path(folder) / f"{rank}.pt")
    trainer.logger.loggers = []
    outputs[1]["skipped"] = torch.tensor(float(rank))  # by its own loss: nnU-Net wants as many losses of each rank
    trainer.on_train_epoch_end(outputs)

    budget.on_loop_start()
    rates: list[float] = []
    with mock.patch.object(ResumableTrainer, "save", lambda *_: time.sleep(SAVING)):
        while budget.training_goes_on():  # by the clock, which is not the same on both
            time.sleep(0.05 * (1 + 2 * rank))
            budget.set_learning_rate()
            rates.append(budget.optimizer.param_groups[0]["lr"])
            budget._save_or_stop()
            if len(rates) == 1 and rank == 0:
                budget.save(Path(folder) / "checkpoint.pth", must=False)
    torch.save((rates, budget.common_seconds), Path(folder) / f"budget_{rank}.pt")

    unet.dataloader_train = unet.dataloader_val = Loader(rank, unet)
    unet.on_train_start = lambda: None
    unet.run_training()


def test_two_ranks_are_one_training_and_leave_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    with pytest.raises(mp.ProcessExitedException) as left:
        mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    assert left.value.exit_code == 75
    (file,) = (tmp_path / "nnUNet_results").glob("*/*/fold_0/checkpoint_latest.pth")
    outputs = load_checkpoint(file)["masksam_within_epoch"]["outputs"]
    budgets = [torch.load(tmp_path / f"budget_{rank}.pt") for rank in (0, 1)]
    assert budgets[0] == budgets[1], "one goes on, the other ends"
    assert budgets[0][1] < SAVING, "saving counts"
    assert outputs["skipped"].tolist() == [0, 0, 1, 0], "the other rank's NaN is rank 0's too"

    (gradients, states), (_, others) = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1))
    for method, state, other in zip(("MaskSAMTrainer", *RELATED), states, others, strict=True):
        for name, value in state.items():
            assert torch.equal(value, other[name]), f"{name} of {method} differs between ranks"
    single = make_trainer(loss=loss_config())  # nnU-Net's own Dice is normalised per rank, by its design
    x, y = data()
    for _ in range(2):
        single.train_step({"data": x, "target": y})
    for name, parameter in single.sam_network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-4, rtol=2e-2, msg=name)
