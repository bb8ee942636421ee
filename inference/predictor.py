"""nnU-Net's predictor with windows and mirrors in batches, and with what folds share held once."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from itertools import combinations
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
from masksam_nnunet.files import read_json

from .batches import Batches, automatic_size
from .fold_weights import load_own_tensors, own_tensors
from .networks import network_to_predict

Window = tuple[slice | int, ...]
"""nnU-Net's index of a window in (C, x, y, z): all channels, then a slice for each axis, or an int for a 2D one."""


class MaskSAMPredictor(nnUNetPredictor):
    """Predicts what nnU-Net's predictor predicts, with any trainer's network, and differs in two ways.

    - Windows and their mirrors go through the network in batches.
    - ``list_of_parameters`` holds, for each fold, the tensors that not all folds agree on; the others, a frozen SAM
      among them, are in the network only. Nothing else of a checkpoint stays in memory.

    Args:
        args: nnU-Net's.
        batch_size: (window, mirror) pairs at once; chosen if not given. Halved, for good, when memory runs out.
        kwargs: nnU-Net's.

    Raises:
        ValueError: a batch size that is not a positive integer.
    """

    list_of_parameters: list[dict[str, Tensor]]

    def __init__(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = None if batch_size is None else Batches(batch_size)

    # ---- folds ---------------------------------------------------------------------------------------------------

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: tuple[int | str, ...] | str | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """As nnU-Net's; checkpoints are read one at a time, as tensors, numbers and texts: no code in them is run.

        Raises:
            FileNotFoundError: no folds.
            CheckpointError: a checkpoint is missing or damaged, or holds more than that.
        """
        if use_folds is None:
            use_folds = self.auto_detect_available_folds(model_training_output_dir, checkpoint_name)
        folds = [use_folds] if isinstance(use_folds, str) else list(use_folds)
        if not folds:
            raise FileNotFoundError(
                f"use_folds = {use_folds!r}: none to predict with, or no fold in {model_training_output_dir} has a "
                f"{checkpoint_name}. Name the folds that are trained."
            )
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
        """As nnU-Net's: ``parameters`` are state dicts, of which none is kept."""
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
        """For each fold (K, x, y, z), float16, on the CPU, for data (C, x, y, z); the network then holds this fold."""
        threads = torch.get_num_threads()
        torch.set_num_threads(min(default_num_processes, threads))
        try:
            for index in range(len(self.list_of_parameters)):
                self.hold_fold(index)
                yield self.predict_sliding_window_return_logits(data).to("cpu")
        finally:
            torch.set_num_threads(threads)

    def hold_fold(self, index: int) -> nn.Module:
        """Give the network the weights of one of the folds, counted as they were named; the network, uncompiled."""
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
        total = torch.zeros(
            (self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half, device=device
        )
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
            raise RuntimeError(
                "the prediction has infinite values: sums of the network's outputs, weighted by up to 10, must stay "
                "below 65504, float16's largest number; a network whose outputs are larger cannot be predicted with"
            )
        return total

    def _mean_over_mirrors(self, data: Tensor, slicers: list[Window]) -> Iterator[Tensor]:
        """For each window its prediction (K, *patch), in the network's precision."""
        mirrors = self._mirrors()
        if self.batches is None:
            self.batches = Batches(automatic_size(self.device, tuple(self.configuration_manager.patch_size)))

        def window(index: int) -> Tensor:
            return torch.flip(data[slicers[index // len(mirrors)]].to(self.device), mirrors[index % len(mirrors)])

        outputs = self.batches.outputs(self.network, window, len(slicers) * len(mirrors))
        for _ in slicers:
            prediction = next(outputs).clone()
            for axes in mirrors[1:]:
                prediction += torch.flip(next(outputs), axes)
            yield prediction.div_(len(mirrors))

    def _mirrors(self) -> list[tuple[int, ...]]:
        """The axes of (C, *patch) to flip, for each mirror; the first flips none."""
        axes = [axis + 1 for axis in (self.allowed_mirroring_axes or ())] if self.use_mirroring else []
        return [chosen for count in range(len(axes) + 1) for chosen in combinations(axes, count)]
