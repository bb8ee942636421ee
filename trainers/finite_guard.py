"""Leaves out optimizer steps whose loss or gradient is not finite, without waiting for the device.

The device itself decides whether the optimizer moves, by the ``found_inf`` of PyTorch's fused optimizers, which its
gradient scaler uses too. The number of skipped steps reaches the host by an asynchronous copy, and is read one
iteration later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from masksam_nnunet.environment import MAX_SKIPPED

_KEPT = 3  # iterations whose details are kept: the host is at most two ahead of what it knows


def can_skip(device: torch.device) -> bool:
    """Whether fused optimizers can skip a step on this device."""
    return device.type in ("cpu", "cuda")


def ready_to_skip(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Prepare an optimizer whose first step may be skipped, and which may load the state of an unfused one.

    Fused SGD fills its momentum in the first step; a skipped first step would leave it undefined.
    """
    fused = [group.get("fused") for group in optimizer.param_groups]

    def as_here(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**g, "fused": f, "foreach": None} for g, f in zip(state["param_groups"], fused, strict=True)]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(as_here)
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Iteration(NamedTuple):
    """The details of an iteration; its tensors are on the device, except the batch's."""

    number: int
    rate: float
    batch: Mapping[str, Any]
    loss: Tensor
    terms: Mapping[str, Tensor]
    bad: Tensor
    """1.0 where no step was made, else 0.0."""
    norms: Tensor
    """The gradient's norms, (parts,)."""


class FiniteGuard:
    """Skips every step that would spoil the weights, and counts them.

    Args:
        parts: the trained parameters by the part of the network that they belong to.
        limit: the number of skipped iterations in a row that ends a training.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Parameter]], limit: int) -> None:
        self.parts = {name: list(parameters) for name, parameters in parts.items() if len(parameters)}
        self.limit = limit
        self.in_a_row = self.skipped = 0
        """As far as the host knows."""
        self._reported = -1
        device = next(p.device for parameters in self.parts.values() for p in parameters)
        self._counts = torch.zeros(2, device=device)  # in a row, in all
        self._on_host = torch.zeros(2, pin_memory=device.type == "cuda")
        self._latest: deque[Iteration] = deque(maxlen=_KEPT)
        self._fitting = torch.zeros((), device=device)  # the largest scale at which a gradient was finite

    def checked(self, loss: Tensor) -> Tensor:
        """The loss to be differentiated: one that is not finite makes every gradient NaN, on all ranks."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def clip(self, largest: float) -> tuple[Tensor, Tensor]:
        """Clip the gradient, if it is finite, to this norm.

        Returns:
            1.0 where it is not finite, else 0.0; the norms of the parts (parts,).
        """
        device = self._counts.device
        gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in self.parts.items()}
        norms = torch.stack([nn.utils.get_total_norm(g).to(device) for g in gradients.values()])
        total = torch.linalg.vector_norm(norms)
        finite = total.isfinite()
        everything = [p for group in self.parts.values() for p in group]
        nn.utils.clip_grads_with_norm_(everything, largest, torch.where(finite, total, 0.0))
        return (~finite).float(), norms

    def unless_settling(self, bad: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        """``bad``, but 0.0 where a gradient scaler's scale is one that no gradient has fitted into float16 with.

        It starts at 65536, is halved until a gradient fits, and doubled again later: none of that is trouble.
        """
        settling = loss.detach().isfinite() & (scale > self._fitting) & (scale > 1)
        self._fitting = torch.where(bad == 0, torch.maximum(self._fitting, scale), self._fitting)
        return bad * ~settling

    def step(self, optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
        """The optimizer's step, unless the gradient is bad."""
        if not can_skip(bad.device):
            if not bad.item():
                optimizer.step()
            return
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, bad
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf

    def note(self, iteration: Iteration) -> None:
        """Count an iteration."""
        self._latest.append(iteration)
        self._counts = torch.stack([(self._counts[0] + 1) * iteration.bad, self._counts[1] + iteration.bad])
        self._on_host.copy_(self._counts, non_blocking=True)

    def new_reports(self) -> list[str]:
        """A description of each skipped iteration that became known since the last call."""
        in_a_row, skipped = (int(x) for x in self._on_host.tolist())
        new, self.in_a_row, self.skipped = skipped - self.skipped, in_a_row, skipped
        found = [it for it in self._latest if it.number > self._reported and it.bad] if new else []
        self._reported = found[-1].number if found else self._reported
        return [self._describe(it) for it in found]

    def diagnosis(self) -> str | None:
        """Why the training cannot continue, with the details of the latest iterations; None if it can."""
        if self.in_a_row < self.limit:
            return None
        latest = "\n  ".join(self._describe(it) for it in self._latest if it.bad)
        return (
            f"the loss or its gradient was not finite in {self.in_a_row} iterations in a row:\n  {latest}\nThese made "
            "no step, and earlier checkpoints are kept. If the input is not finite, correct those cases and preprocess "
            "again; else check their labels, or lower the learning rate (a trainer's initial_lr). "
            f"{MAX_SKIPPED} sets how many in a row are allowed"
        )

    def _describe(self, it: Iteration) -> str:
        terms = [f"{name} {value.item():.4g}" for name, value in it.terms.items() if not value.isfinite()]
        norms = ", ".join(f"{name} {norm:.4g}" for name, norm in zip(self.parts, it.norms.tolist(), strict=True))
        data: Tensor = it.batch["data"]
        cases = [str(key) for key in it.batch.get("keys", range(len(data)))]
        inputs = [case for case, image in zip(cases, data, strict=True) if not image.isfinite().all()]
        return (
            f"iteration {it.number}, learning rate {it.rate:.4g}: loss {it.loss.item():.4g}, not finite are its terms "
            f"{', '.join(terms) or '(none)'}; norms of the gradient: {norms}; cases: {', '.join(cases)}; not finite is "
            f"the input of {', '.join(inputs) or 'none'}"
        )
