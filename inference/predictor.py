"""nnU-Net's predictor with windows and mirrors in batches, and with what folds share held once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from tqdm import tqdm

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import ModelError
from masksam_nnunet.files import read_json

from .models import network_to_predict

Window = tuple[slice | int, ...]
"""nnU-Net's index of a window in (C, x, y, z): all channels, then a slice for each axis, or an int for a 2D one."""

# The most voxels and windows in a batch. On CUDA, about one of nnU-Net's large 3D patches. Elsewhere two small
# windows: PyTorch convolves one small volume on a path that takes up to five times as long, and more gain nothing.
CUDA_LIMITS, OTHER_LIMITS = (2**21, 16), (2**18, 2)


class MaskSAMPredictor(nnUNetPredictor):
    """Predicts what nnU-Net's predictor predicts, with any trainer's network, and differs in two ways.

    - Windows and their mirrors go through the network in batches.
    - ``list_of_parameters`` holds, for each fold, only the tensors that differ between folds; the network holds the
      others, a frozen SAM among them.

    ``batch_size`` is the number of (window, mirror) pairs at once, chosen from device and patch if not given, and
    halved, for good, when memory runs out. All other arguments are nnU-Net's.
    """

    list_of_parameters: list[dict[str, Tensor]]

    def __init__(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = None if batch_size is None else WindowBatches(batch_size)

    # ---- folds ---------------------------------------------------------------------------------------------------

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: tuple[int | str, ...] | str | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Load folds as nnU-Net does, one checkpoint at a time, without running code from a checkpoint.

        Raises:
            ModelError: no folds.
            MaskSAMError: a checkpoint is missing, damaged, or holds more than tensors and plain values.
        """
        if use_folds is None:
            use_folds = self.auto_detect_available_folds(model_training_output_dir, checkpoint_name)
        folds = [use_folds] if isinstance(use_folds, str) else list(use_folds)
        if not folds:
            raise ModelError(f"no fold in {model_training_output_dir} has a {checkpoint_name}; name trained folds (-f)")
        root = Path(model_training_output_dir)
        files = [root / f"fold_{fold}" / checkpoint_name for fold in folds]
        plans, dataset_json = PlansManager(str(root / "plans.json")), read_json(root / "dataset.json")
        first = load_checkpoint(files[0])
        name, trainer = first["init_args"]["configuration"], first["trainer_name"]
        network = network_to_predict(plans, name, dataset_json, trainer)
        network.load_state_dict(first["network_weights"])
        axes = first.get("inference_allowed_mirroring_axes")
        del first  # the network has copies
        configuration = plans.get_configuration(name)
        super().manual_initialization(network, plans, configuration, None, dataset_json, trainer, axes)
        self.list_of_parameters = own_tensors(network, (load_checkpoint(file)["network_weights"] for file in files[1:]))

    def manual_initialization(
        self,
        network: nn.Module,
        plans_manager: Any,
        configuration_manager: Any,
        parameters: list[dict[str, Any]] | None,
        *more: Any,
        **named: Any,
    ) -> None:
        """As nnU-Net's; ``parameters`` are state dicts, of which none is kept."""
        super().manual_initialization(network, plans_manager, configuration_manager, parameters, *more, **named)
        if parameters:
            self._plain_network.load_state_dict(parameters[0])
            self.list_of_parameters = own_tensors(self._plain_network, parameters[1:])

    @property
    def _plain_network(self) -> nn.Module:
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """As nnU-Net's: the mean over folds of (K, x, y, z), float16, for data (C, x, y, z)."""
        prediction: Tensor | None = None
        for logits in self.logits_of_folds(data):
            prediction = logits if prediction is None else prediction.add_(logits)
            del logits  # or it would stay while the next fold predicts
        assert prediction is not None
        if len(self.list_of_parameters) > 1:
            prediction /= len(self.list_of_parameters)
        return prediction

    @torch.inference_mode()
    def logits_of_folds(self, data: Tensor) -> Iterator[Tensor]:
        """Yield each fold's (K, x, y, z), float16, on the CPU, for data (C, x, y, z); the network then holds it."""
        threads = torch.get_num_threads()
        torch.set_num_threads(min(default_num_processes, threads))
        try:
            for index in range(len(self.list_of_parameters)):
                self.hold_fold(index)
                yield self.predict_sliding_window_return_logits(data).to("cpu")
        finally:
            torch.set_num_threads(threads)

    def hold_fold(self, index: int) -> nn.Module:
        """Give the network the weights of the fold at ``index`` in the order loaded; return it, uncompiled."""
        load_own_tensors(self._plain_network, self.list_of_parameters[index])
        return self._plain_network

    # ---- windows -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: list[Window], do_on_device: bool = True
    ) -> Tensor:
        results_device = self.device if do_on_device else torch.device("cpu")
        empty_cache(self.device)
        try:
            return self._mean_over_windows(data.to(results_device), slicers, results_device)
        except RuntimeError as error:
            # nnU-Net tries again, with results on the CPU, while this error's traceback still holds the volumes.
            traceback.clear_frames(error.__traceback__)
            empty_cache(self.device)
            raise

    def _mean_over_windows(self, data: Tensor, slicers: list[Window], device: torch.device) -> Tensor:
        """The weighted mean (K, x, y, z) of the windows' predictions, summed in nnU-Net's order and precision."""
        heads = self.label_manager.num_segmentation_heads
        total = torch.zeros((heads, *data.shape[1:]), dtype=torch.half, device=device)
        weights = torch.zeros(data.shape[1:], dtype=torch.half, device=device)
        weight: Tensor | float = 1.0
        if self.use_gaussian:
            patch_size = tuple(self.configuration_manager.patch_size)
            weight = compute_gaussian(patch_size, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
        shown = tqdm(self._mean_over_mirrors(data, slicers), total=len(slicers), disable=not self.allow_tqdm)
        for prediction, window in zip(shown, slicers, strict=True):
            total[window] += prediction.to(device).mul_(weight)
            weights[window[1:]] += weight
        total /= weights
        if torch.isinf(total).any():
            raise RuntimeError("the prediction is infinite: the network's outputs exceed float16's 65504 / 10")
        return total

    def _mean_over_mirrors(self, data: Tensor, slicers: list[Window]) -> Iterator[Tensor]:
        """Yield each window's prediction (K, *patch), in the network's precision."""
        axes = [axis + 1 for axis in (self.allowed_mirroring_axes or ())] if self.use_mirroring else []
        mirrors = [chosen for count in range(len(axes) + 1) for chosen in combinations(axes, count)]  # () comes first
        if self.batches is None:
            self.batches = WindowBatches(automatic_size(self.device, tuple(self.configuration_manager.patch_size)))

        def window(index: int) -> Tensor:
            return torch.flip(data[slicers[index // len(mirrors)]].to(self.device), mirrors[index % len(mirrors)])

        outputs = self.batches.outputs(self.network, window, len(slicers) * len(mirrors))
        for _ in slicers:
            prediction = next(outputs).clone()
            for mirror in mirrors[1:]:
                prediction += torch.flip(next(outputs), mirror)
            yield prediction.div_(len(mirrors))


# ---- batches of windows --------------------------------------------------------------------------------------------


def automatic_size(device: torch.device, patch_size: tuple[int, ...]) -> int:
    """How many windows of ``patch_size`` to try at once: a power of two, of which mirrored copies leave no rest.

    A GPU chooses its kernels again for every size.
    """
    voxels, most = CUDA_LIMITS if device.type == "cuda" else OTHER_LIMITS
    fitting = max(1, min(most, voxels // torch.Size(patch_size).numel()))
    return 1 << fitting.bit_length() - 1


class WindowBatches:
    """Calls a network in batches of ``size``, which is halved when memory runs out, and stays so."""

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size = {size!r} must be a positive integer")
        self.size = size

    def outputs(self, network: nn.Module, make_input: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
        """Yield the network's outputs for ``count`` inputs, in order: views (*output) into a batch's output.

        ``make_input`` makes the input of an index in [0, count), on the network's device. Errors are the network's; an
        OutOfMemoryError is raised where memory runs out with a single input too.
        """
        done = 0
        while done < count:
            results = self._attempt(network, make_input, range(done, min(done + self.size, count)))
            done += len(results)
            yield from results
            del results  # or it would stay in memory beside the next batch

    def _attempt(self, network: nn.Module, make_input: Callable[[int], Tensor], indices: range) -> tuple[Tensor, ...]:
        """The outputs of one batch; none, and a smaller size from now on, if it does not fit."""
        try:
            return network(torch.stack([make_input(index) for index in indices])).unbind(0)
        except RuntimeError as error:
            # cuBLAS, cuDNN and MPS report it as plain RuntimeErrors.
            full = any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))
            if len(indices) == 1 or not (full or isinstance(error, torch.OutOfMemoryError)):
                raise
        # Not in the handler, where the traceback still holds the failed attempt's tensors.
        self.size = len(indices) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"Out of memory with {len(indices)} windows at once, going on with {self.size}")
        return ()


# ---- weights of folds ----------------------------------------------------------------------------------------------


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under one name: a state dict repeats those of a module that has several."""
    return {name: t.detach() for name, t in chain(network.named_parameters(), network.named_buffers())}


def own_tensors(network: nn.Module, others: Iterable[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Copy, for each fold, the tensors that differ between folds in any bit; none for a single fold.

    Args:
        network: with the first fold's weights, which it also holds afterwards.
        others: the other folds' state dicts, which may lack what the network completes; they are loaded one by one,
            and none is kept.
    """
    held = network_tensors(network)
    first: dict[str, Tensor] = {}  # the first fold's, where a later one differs
    folds: list[dict[str, Tensor]] = [{}]
    for state in others:
        doubtful = [n for n, t in held.items() if n not in first and not (n in state and same_bits(state[n], t))]
        before = {name: held[name].clone() for name in doubtful}  # all else is what the first fold has
        network.load_state_dict(state)
        del state  # or it would stay while the next one is read
        first |= {name: t for name, t in before.items() if not same_bits(held[name], t)}
        folds.append({name: held[name].clone() for name, t in first.items() if not same_bits(held[name], t)})
    load_own_tensors(network, first)
    return [first | own for own in folds]


@torch.no_grad()
def load_own_tensors(network: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Turn the network of one fold into that of another, whose :func:`own_tensors` are given."""
    held = network_tensors(network)
    for name, tensor in own.items():
        held[name].copy_(tensor)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit by bit: NaNs too, and zeros with their signs."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a.to(b.device), b)
