"""Windows go through a network several at once; fewer when memory runs out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from masksam_nnunet.inference.predictor import WindowBatches, automatic_size


class Doubled(nn.Module):
    """Twice its input; raises ``error`` for batches larger than ``fits``."""

    def __init__(self, fits: int = 1000, error: RuntimeError | None = None) -> None:
        super().__init__()
        self.fits, self.error = fits, error or torch.OutOfMemoryError("CUDA out of memory")
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        if len(x) > self.fits:
            raise self.error
        return 2 * x


def doubled(batches: WindowBatches, network: Doubled, count: int) -> list[float]:
    return [float(y) for y in batches.outputs(network, lambda index: torch.tensor(float(index)), count)]


@pytest.mark.parametrize(("size", "calls"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_batches_are_full_but_for_the_last(size: int, calls: list[int]) -> None:
    network = Doubled()
    assert doubled(WindowBatches(size), network, 7) == [0, 2, 4, 6, 8, 10, 12]
    assert network.calls == calls
    assert doubled(WindowBatches(size), network, 0) == []


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_halved_for_good(error: RuntimeError) -> None:
    network, batches = Doubled(fits=3, error=error), WindowBatches(16)
    assert doubled(batches, network, 9) == [2.0 * index for index in range(9)]
    assert network.calls == [9, 4, 2, 2, 2, 2, 1]
    network.calls.clear()
    doubled(batches, network, 3)
    assert network.calls == [2, 1] and batches.size == 2


def test_what_halving_cannot_mend_is_raised() -> None:
    alone, broken = Doubled(fits=0), Doubled(fits=0, error=RuntimeError("wrong shape"))
    with pytest.raises(torch.OutOfMemoryError):
        doubled(WindowBatches(4), alone, 4)
    assert alone.calls == [4, 2, 1]
    with pytest.raises(RuntimeError, match="wrong shape"):
        doubled(WindowBatches(4), broken, 4)
    assert broken.calls == [4]


@pytest.mark.parametrize("size", [0, 2.0, True])
def test_other_sizes_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match=f"batch_size = {size!r}"):
        WindowBatches(size)  # type: ignore[arg-type]


def test_automatic_sizes_shrink_with_the_patch() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [automatic_size(cuda, patch) for patch in ((320, 256), (4, 256, 256), (10, 256, 224))] == [16, 8, 2]
    assert automatic_size(cuda, (128, 128, 128)) == 1
    assert [automatic_size(cpu, patch) for patch in ((320, 256), (16, 48, 48), (64, 128, 128))] == [2, 2, 1]
