"""Prediction that measures itself, and takes what of the model fits into the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..predictor import MaskSAMPredictor, WindowBatches, automatic_size
from .time_limit import Deadline, Way, Work, choose, ways


class TimedPrediction:
    """Predicts one case after another with as many mirrors and folds as the deadline allows.

    A batch of windows is predicted first to measure them; the seconds of a window and of writing are then known better
    from each case. The cases that are left share the time.

    Args:
        predictor: with its model loaded.
        deadline: of all cases.
        log: told what is left out, and why.
    """

    def __init__(self, predictor: MaskSAMPredictor, deadline: Deadline, log: Callable[[str], None]) -> None:
        self.predictor = predictor
        self.deadline = deadline
        self.log = log
        self._seconds: float | None = None
        """For a window, once measured."""
        self._preparing = 0.0
        self._writing: float | None = None
        """Seconds for each of the logits' voxels and classes, once measured."""

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Measures reading and preprocessing."""
        started = time.perf_counter()
        yield
        self._preparing = time.perf_counter() - started

    @contextmanager
    def writing(self, shape: torch.Size) -> Iterator[None]:
        """Measures resampling and writing logits of ``shape``."""
        started = time.perf_counter()
        yield
        self._writing = (time.perf_counter() - started) / math.prod(shape)

    @torch.inference_mode()
    def __call__(self, data: Tensor, cases_left: int) -> Tensor:
        """The mean of the folds' logits (K, x, y, z), float16, on the CPU.

        Args:
            data: (C, x, y, z).
            cases_left: this one included.
        """
        possible = ways(len(self.predictor.list_of_parameters), len(self.predictor._mirrors()))
        way = possible[0]
        if math.isfinite(self.deadline.limit):
            way = self._choose(data, possible, cases_left)
        mirroring = self.predictor.use_mirroring
        self.predictor.use_mirroring = mirroring and (way.mirrors > 1)
        try:
            return self._mean(data, way)
        finally:
            self.predictor.use_mirroring = mirroring

    def _choose(self, data: Tensor, possible: list[Way], cases_left: int) -> Way:
        if self._seconds is None:
            self._seconds = seconds_per_window(self.predictor, len(data))
        work = Work(window_count(self.predictor, data), self._seconds, self._estimated_writing(data))
        left = self.deadline.left() / cases_left
        way = choose(work, possible, left)
        case = f"{work.windows} windows of {work.seconds:.3g} s"
        self.log(f"{case}: {possible[0]} would take {work.of(possible[0]):.0f} s, {left:.0f} s are left for this case")
        if way != possible[0]:
            self.log(f"time limit: predicting with {way} instead, {work.of(way):.0f} s")
        if work.of(way) > left:
            self.log("time limit: even this is too long; going on, for the limit may not be strict")
        return way

    def _estimated_writing(self, data: Tensor) -> float:
        heads = self.predictor.label_manager.num_segmentation_heads
        if self._writing is not None:
            return self._writing * heads * math.prod(data.shape[1:])
        # Cubic resampling of a channel, and linear resampling of a class, which takes about a quarter of that.
        return self._preparing * max(1.0, heads / (4 * len(data)))

    def _mean(self, data: Tensor, way: Way) -> Tensor:
        total: Tensor | None = None
        started, done, longest = time.perf_counter(), 0, 0.0
        for logits in self.predictor.logits_of_folds(data):
            total = logits if total is None else total.add_(logits)
            del logits  # or it would stay while the next fold predicts
            done += 1
            longest = max(longest, time.perf_counter() - started)
            if done == way.folds:
                break
            if longest + self._estimated_writing(data) > self.deadline.left():
                self.log(f"time limit: stopped after {done} of {way.folds} folds, which took longer than estimated")
                break
            started = time.perf_counter()
        assert total is not None
        self._seconds = longest / (window_count(self.predictor, data) * way.mirrors)
        return total.div_(done) if done > 1 else total


def window_count(predictor: MaskSAMPredictor, data: Tensor) -> int:
    """How many windows nnU-Net takes of ``data`` (C, x, y, z)."""
    patch, shape = tuple(predictor.configuration_manager.patch_size), data.shape[1:]
    flat = len(shape) - len(patch)  # 2D networks see slice by slice
    padded = (*shape[:flat], *map(max, shape[flat:], patch))
    return len(predictor._internal_get_sliding_window_slicers(padded))


@torch.inference_mode()
def seconds_per_window(predictor: MaskSAMPredictor, channels: int) -> float:
    """Seconds for one window and mirror, by predicting a batch of noise with the first fold."""
    predictor.network = predictor.network.to(predictor.device).eval()
    patch = tuple(predictor.configuration_manager.patch_size)
    if predictor.batches is None:
        predictor.batches = WindowBatches(automatic_size(predictor.device, patch))
    batch = predictor.batches.size
    noise = torch.randn(channels, *patch, device=predictor.device)
    cuda = predictor.device.type == "cuda"
    started = time.perf_counter()
    for _ in range(1 + cuda):  # the first time cuDNN tries its algorithms
        started = time.perf_counter()
        with torch.autocast("cuda") if cuda else nullcontext():
            for _ in predictor.batches.outputs(predictor.network, lambda _: noise, batch):
                pass
        if cuda:
            torch.cuda.synchronize(predictor.device)
    return (time.perf_counter() - started) / batch
