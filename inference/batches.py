"""Many inputs through a network, several at once, fewer where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# Voxels in a batch of windows, and windows. On CUDA about one of nnU-Net's large 3D patches. Elsewhere two small
# windows: PyTorch convolves one small volume on a path that takes up to five times as long (nnU-Net's own networks;
# ours avoid it); more gain nothing.
CUDA, OTHER = (2**21, 16), (2**18, 2)


def automatic_size(device: torch.device, patch_size: tuple[int, ...]) -> int:
    """How many windows of ``patch_size`` to try at once."""
    voxels, most = CUDA if device.type == "cuda" else OTHER
    return max(1, min(most, voxels // torch.Size(patch_size).numel()))


class Batches:
    """Calls a network in batches of ``size``, which is halved when memory runs out, and stays so."""

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size = {size!r} must be a positive integer, or None to have it chosen")
        self.size = size

    def outputs(self, network: nn.Module, make_input: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
        """The network's outputs for ``count`` inputs, in order.

        Args:
            network: takes (B, *input) and returns (B, *output).
            make_input: the input of an index in [0, count), on the network's device.
            count: how many.

        Yields:
            (*output), a view into its batch's output.

        Raises:
            RuntimeError: the network's own; memory running out with a single input too.
        """
        done = 0
        while done < count:
            results = self._attempt(network, make_input, range(done, min(done + self.size, count)))
            done += len(results)
            yield from results
            del results  # or it would stay in memory beside the next batch

    def _attempt(
        self, network: nn.Module, make_input: Callable[[int], Tensor], indices: range
    ) -> tuple[Tensor, ...] | tuple[()]:
        """The outputs of one batch; none, and a smaller size from now on, if it does not fit."""
        try:
            return network(torch.stack([make_input(index) for index in indices])).unbind(0)
        except RuntimeError as error:
            if len(indices) == 1 or not _is_out_of_memory(error):
                raise
        # Not in the handler, where the traceback still holds the failed attempt's tensors.
        self.size = len(indices) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"Out of memory with {len(indices)} windows at once, going on with {self.size}")
        return ()


def _is_out_of_memory(error: RuntimeError) -> bool:
    # cuBLAS, cuDNN and MPS report it as plain RuntimeErrors.
    texts = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
