"""Train a named variant of MaskSAM, or nnU-Net, for a number of iterations, and append what it learned to a file.

    python benchmarks/learning/variants.py light acdc --fold 1 --iterations 120

Patch, batch size and r are those of the dataset's setting below, for all variants alike. The fold's validation cases
are predicted by nnU-Net's own validation, which these trainers do without mirroring. nnU-Net's folders hold the data
preprocessed for nnUNetPlans.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from segment_anything.modeling.common import LayerNorm2d
from short_plans import PAPER, configuration_of, make_plans
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from masksam_nnunet import __version__
from masksam_nnunet.config import LightConfig, MaskSAMConfig, UNetConfig
from masksam_nnunet.environment import BUDGET_ITERATIONS, RANDOM_INIT
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.provenance import git_hash
from masksam_nnunet.losses.matching import Matches
from masksam_nnunet.modeling import MaskSAMOutput
from masksam_nnunet.modeling.adapters import NoAdapter
from masksam_nnunet.modeling.blocks import GAIN
from masksam_nnunet.modeling.geometry import extent_in_patch, pad, to_patch
from masksam_nnunet.modeling.weight_deltas import change_projections, lora
from masksam_nnunet.trainers import MaskSAMTrainer

RESULTS = Path(__file__).with_name("results.jsonl")
MASKS = dict.fromkeys(("mask_bce", "mask_dice", "aux_bce", "aux_dice"), 0.0)
MASKSAM, NNUNET = "MaskSAMTrainer_lite_medsam_budget", "nnUNetTrainer_adamw_budget"


@dataclass(frozen=True)
class Setting:
    """A dataset, and what all variants see of it."""

    dataset: str
    patch: tuple[int, ...]
    resolution: float

    @property
    def folder(self) -> Path:
        """With its preprocessed data."""
        return Path(os.environ["nnUNet_preprocessed"]) / self.dataset


SETTINGS = {
    "acdc": Setting("Dataset027_ACDC", (4, 160, 160), 0.5),
    "acdc_small": Setting("Dataset027_ACDC", (4, 112, 112), 0.5),
    "hippocampus": Setting("Dataset004_Hippocampus", (8, 56, 40), 1),
    "chaos": Setting("Dataset101_CHAOST2", (4, 192, 192), 0.5),
    "lgg": Setting("Dataset104_LGG3ch", (4, 192, 192), 0.5),
    "chase": Setting("Dataset105_CHASEDB1", (320, 320), 0.5),
}

Change = Callable[[MaskSAMConfig], MaskSAMConfig]


@dataclass(frozen=True)
class Variant:
    """What differs from the light generator with all its parts."""

    text: str
    """The same in words."""
    change: Change = lambda config: config
    unet: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the trainer, set before its training starts."""
    prepare: Callable[[Any], None] = lambda trainer: None
    """Called with the trainer when its network holds SAM's weights."""
    trainer: str = MASKSAM
    random: bool = False
    """Whether SAM keeps random weights."""
    free: bool = False
    """Whether there are K free queries."""


def _forward_only(config: MaskSAMConfig) -> MaskSAMConfig:
    return replace(config, encoder_adapters=False)


def _free(config: MaskSAMConfig) -> MaskSAMConfig:
    return replace(config, matching="slice")


def _loss(**weights: float) -> Change:
    return lambda config: replace(config, loss=replace(config.loss, **weights))


def _widths(*widths: int) -> Change:
    return lambda config: replace(config, generator=LightConfig(widths))


def _gain(trainer: Any) -> nn.Parameter:
    return trainer.sam_network.mask_head.seg_layers["gains"][0]


def _no_gain(trainer: Any) -> None:
    _gain(trainer).requires_grad_(False)


def _random(*parts: str) -> Callable[[Any], None]:
    """Random weights in the frozen layers of these parts of the network."""

    def prepare(trainer: Any) -> None:
        for module in (module for part in parts for module in getattr(trainer.sam_network, part).modules()):
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not module.weight.requires_grad:
                module.reset_parameters()

    return prepare


def _rate(rate: float, warmup: int = 30) -> Callable[[Any], None]:
    def prepare(trainer: Any) -> None:
        trainer.initial_lr, trainer.warmup_iterations = rate, warmup

    return prepare


def _without_mirroring(patch: Any, rotation: Any, scales: Any, mirror_axes: Any, *more: Any, **named: Any) -> Any:
    """nnU-Net's augmentation of training patches, of which none is mirrored."""
    return nnUNetTrainer.get_training_transforms(patch, rotation, scales, None, *more, **named)


UNMIRRORED = {"get_training_transforms": _without_mirroring}


def _averaged(decay: float) -> Callable[[Any], None]:
    """The mean of the trained weights, weighted by age, is what is validated."""

    def prepare(trainer: Any) -> None:
        trained = [p for p in trainer.sam_network.parameters() if p.requires_grad]
        mean = AveragedModel(nn.ParameterList(trained), multi_avg_fn=get_ema_multi_avg_fn(decay))
        step, validate = trainer.train_step, trainer.perform_actual_validation

        def train_step(batch: dict[str, Any]) -> dict[str, Any]:
            outputs: dict[str, Any] = step(batch)
            mean.update_parameters(nn.ParameterList(trained))
            return outputs

        def perform_actual_validation(*given: Any) -> None:
            with torch.no_grad():
                for parameter, value in zip(trained, mean.module.parameters(), strict=True):
                    parameter.copy_(value)
            validate(*given)

        trainer.train_step, trainer.perform_actual_validation = train_step, perform_actual_validation

    return prepare


def _no_decoder(trainer: Any) -> None:
    """Nothing of SAM's masks reaches the output: neither they, nor as features of the mask head."""
    _no_gain(trainer)
    layer = trainer.sam_network.mask_head.seg_layers["from_masks"]
    nn.init.zeros_(layer.weight)
    layer.weight.requires_grad_(False)


def _slow_gain(trainer: Any) -> None:
    """The gain of SAM's masks grows as fast as another parameter."""
    gain, set_learning_rate = _gain(trainer), trainer.set_learning_rate
    for group in trainer.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not gain]
    trainer.optimizer.add_param_group({"params": [gain], "weight_decay": 0.0})

    def set_learning_rates() -> None:
        set_learning_rate()
        trainer.optimizer.param_groups[-1]["lr"] /= GAIN

    trainer.set_learning_rate = set_learning_rates


def _supervised_decoder(trainer: Any) -> None:
    """SAM's own masks have the mask losses too, beside the sum."""
    network, judge = trainer.sam_network, trainer.criterion
    given: list[Tensor] = []

    def keep(head: nn.Module, inputs: Any) -> None:
        given[:] = inputs[:1]

    network.mask_head.register_forward_pre_hook(keep)
    _add_loss(judge, lambda _: given[0])


def _denoising(trainer: Any) -> None:
    """SAM's decoder is asked for the targets once more, prompted with their boxes and masks, both with errors.

    After DN-DETR (arXiv 2203.01305) and Mask DINO (arXiv 2206.02777).
    """
    network, judge = trainer.sam_network, trainer.criterion
    given: dict[nn.Module, Any] = {}  # what was made last
    for part in (network.image_encoder, network.prompt_generator):
        part.register_forward_hook(lambda part, _, output: given.update({part: output}))

    def masks(segmentation: Tensor) -> Tensor:
        (_, neck), prompts = given.values()
        targets = judge.find_targets(segmentation)
        s, t = targets.present.nonzero(as_tuple=True)
        lead, size = prompts.mask_logits.shape[:3], network.grid.masks  # (B, N, D)
        where = s // lead[2], targets.classes[s, t], s % lead[2]
        boxes, wanted = prompts.boxes.detach().clone(), prompts.mask_logits.detach().clone()
        sides = (targets.boxes[s, t, 2:] - targets.boxes[s, t, :2]).repeat(1, 2)
        boxes[where] = (targets.boxes[s, t] + 0.2 * sides * (torch.rand_like(sides) - 0.5)).clamp(0, 1)
        inside = F.adaptive_avg_pool2d(pad(targets.masks[s, t].float(), network.grid), size)
        flipped = F.interpolate(torch.rand(len(s), 1, *(side // 4 for side in size)), size=size)[:, 0] < 0.1
        wanted[where] = 12 * (torch.where(flipped, 1 - inside, inside) - 0.5)
        decoded, _ = network.decode(neck, prompts._replace(mask_logits=wanted, boxes=boxes))
        return decoded

    _add_loss(judge, masks)


def _add_loss(judge: Any, masks: Callable[[Tensor], Tensor]) -> None:
    """Add the mask losses of more masks of the queries, (B, N, D, 4 g_h, 4 g_w), to those of the criterion."""
    forward = judge.forward

    def with_more(output: MaskSAMOutput, segmentation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = forward(output, segmentation)
        logits = to_patch(masks(segmentation), judge.grid).transpose(1, 2)
        more = judge._mask_classification(output._replace(mask_logits=logits), segmentation)
        return total + judge.loss.mask_bce * more["mask_bce"] + judge.loss.mask_dice * more["mask_dice"], terms

    judge.forward = with_more


def _uniform_start(trainer: Any) -> None:
    for layer in trainer.sam_network.prompt_generator.decoder.seg_layers:
        nn.init.uniform_(layer.bias, -0.1, 0.1)


def _late_adapters(trainer: Any) -> None:
    """Only the last stage of the encoder keeps its adapters: the backward pass ends there."""
    encoder = trainer.sam_network.image_encoder
    for stage in list(encoder.stages)[:-1]:
        for block in stage:
            block.attention_adapter = block.mlp_adapter = NoAdapter(0, 0)
    encoder.depth_embedding.requires_grad_(False)


def _train_norms(trainer: Any) -> None:
    """The norms of SAM's encoder are trained too."""
    kinds = nn.LayerNorm | nn.BatchNorm2d | LayerNorm2d
    norms = [module for module in trainer.sam_network.image_encoder.modules() if isinstance(module, kinds)]
    frozen = [p for module in norms for p in module.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    trainer.optimizer.add_param_group({"params": frozen, "weight_decay": 0.0})


def _from_scratch(trainer: Any) -> None:
    """All of SAM is trained."""
    network = trainer.sam_network
    network.requires_grad_(True)
    for module in network.unused():
        module.requires_grad_(False)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()


def _lora(trainer: Any) -> None:
    """Queries and values of SAM's encoder have trained additions of low rank, as in SAMed."""
    attentions = [module.attn for module in trainer.sam_network.image_encoder.modules() if hasattr(module, "attn")]
    change_projections(attentions, lora(4), interleaved=True)  # LiteMedSAM's heads have their own each
    added = [p for attention in attentions for p in attention.qkv.change.parameters()]
    trainer.optimizer.add_param_group({"params": added})


def _flat(trainer: Any) -> None:
    """The generator's convolutions see their own slice alone: weights beside the middle are zero and stay so."""
    for layer in trainer.sam_network.prompt_generator.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 3:
            middle = torch.zeros_like(layer.weight)
            middle[:, :, 1] = 1
            with torch.no_grad():
                layer.weight.mul_(middle)
            layer.weight.register_hook(middle.mul)


def _finest_map(trainer: Any) -> None:
    """nnU-Net's loss sees the finest of the generator's maps only."""

    def finest(_: nn.Module, __: Any, output: Any) -> Any:
        return output._replace(class_maps=output.class_maps[:1]) if isinstance(output, MaskSAMOutput) else output

    trainer.sam_network.register_forward_hook(finest)


def _boxes_of_maps(trainer: Any) -> None:
    """A box is the extent of its mask, not the mean of that and of a learned one, except where the mask is empty."""
    generator = trainer.sam_network.prompt_generator
    learned = generator._boxes

    def boxes(features: tuple[Tensor, ...], mask_logits: Tensor) -> Tensor:
        extent, found = extent_in_patch(mask_logits.detach() > 0, generator.grid)
        return torch.where(found[..., None], extent, learned(features, mask_logits))

    generator._boxes = boxes


def _match_by_class(trainer: Any) -> None:
    """Free queries, each of which is given the targets of one class."""
    trainer.criterion.assign = lambda cost, targets: Matches.of_classes(targets)


def _maps_of_classes(trainer: Any) -> None:
    """The generator's maps are one of all classes, which nnU-Net's loss trains; the queries stay free."""
    generator = trainer.sam_network.prompt_generator
    generator.anchored = True
    generator._start_as_background(1)


VARIANTS = {
    "nnunet_adamw": Variant("nnU-Net with AdamW, same patch and batch", trainer=NNUNET),
    "nnunet_adamw_rate_05": Variant("nnU-Net with AdamW at 5e-4", trainer=NNUNET, prepare=_rate(5e-4, 20)),
    "nnunet_adamw_rate_2": Variant("nnU-Net with AdamW at 2e-3", trainer=NNUNET, prepare=_rate(2e-3, 20)),
    "nnunet_adamw_unmirrored": Variant("nnU-Net with AdamW, no mirroring", trainer=NNUNET, settings=UNMIRRORED),
    "paper": Variant("8 free queries, matched by slice", lambda config: replace(config, **PAPER)),
    "anchors_without_maps": Variant("free queries, each given one class", _free, prepare=_match_by_class, free=True),
    "maps_without_anchors": Variant(
        "free queries, whose mask prompts are a map of the classes", _free, prepare=_maps_of_classes, free=True
    ),
    "light": Variant("the default"),
    "light_rate_1": Variant("learning rate 1e-3", prepare=_rate(1e-3)),
    "light_rate_4": Variant("learning rate 4e-3", prepare=_rate(4e-3)),
    "light_warmup_10": Variant("warm-up of 10 iterations", prepare=_rate(2e-3, 10)),
    "light_averaged": Variant("mean of the weights with a decay of 0.95", prepare=_averaged(0.95)),
    "light_without_decoder": Variant("SAM's masks used nowhere", prepare=_no_decoder),
    "light_slow_gain": Variant("the gain of SAM's masks grows a tenth as fast", prepare=_slow_gain),
    "light_supervised_decoder": Variant("mask losses of SAM's own masks too", prepare=_supervised_decoder),
    "light_denoising": Variant("mask losses of SAM's masks for noisy true prompts too", prepare=_denoising),
    "light_uniform_start": Variant("the generator's maps start as equal shares", prepare=_uniform_start),
    "light_late_adapters": Variant("adapters in the encoder's last stage only", prepare=_late_adapters),
    "light_norms": Variant("the norms of SAM's encoder trained too", prepare=_train_norms),
    "light_lora": Variant("LoRA of rank 4 in SAM's encoder too", prepare=_lora),
    "light_foreground": Variant("all patches hold foreground", settings={"oversample_foreground_percent": 1.0}),
    "light_narrow": Variant("generator of widths 32-24-16", _widths(32, 24, 16)),
    "light_wide": Variant("generator of widths 128-96-64", _widths(128, 96, 64)),
    "light_unmirrored": Variant("no mirroring of training patches", settings=UNMIRRORED),
    "light_flat": Variant("convolutions of the generator within slices", prepare=_flat),
    "light_finest_map": Variant("no deep supervision of the generator's maps", prepare=_finest_map),
    "light_boxes_of_maps": Variant("boxes are the extents of their masks", prepare=_boxes_of_maps),
    "light_two_queries": Variant("two queries a class", lambda config: replace(config, num_queries=2)),
    "light_without_dense_loss": Variant("no loss on the generator's maps", _loss(generator=0.0)),
    "light_without_semantic": Variant("no loss of nnU-Net's on the output", _loss(semantic=0.0)),
    "light_without_aux": Variant("no auxiliary mask losses", _loss(aux_bce=0.0, aux_dice=0.0)),
    "light_without_masks": Variant("no mask losses", _loss(**MASKS)),
    "light_without_gain": Variant("SAM's masks never added (gain 0)", prepare=_no_gain),
    "light_random_decoder": Variant(
        "layers of SAM's decoder with random weights", prepare=_random("mask_decoder", "prompt_encoder")
    ),
    "light_random_encoder": Variant("layers of SAM's encoder with random weights", prepare=_random("image_encoder")),
    "light_random": Variant("all of SAM with random weights", random=True),
    "light_from_scratch": Variant(
        "all of SAM with random weights, and trained, without statistics of batches", random=True, prepare=_from_scratch
    ),
    "light_forward_only": Variant("no adapters in the encoder", _forward_only),
    "unet": Variant("nnU-Net's U-Net with SAM's features, no adapters in the encoder", _forward_only, unet=True),
    "unet_rate_1": Variant(
        "nnU-Net's U-Net with SAM's features, at nnU-Net's rate and warm-up",
        _forward_only,
        unet=True,
        prepare=_rate(1e-3, 20),
    ),
    "unet_adapters": Variant("nnU-Net's U-Net with SAM's features, and adapters", unet=True),
    "unet_random": Variant(
        "nnU-Net's U-Net with features of a random SAM, at nnU-Net's rate and warm-up",
        _forward_only,
        unet=True,
        random=True,
        prepare=_rate(1e-3, 20),
    ),
}


def plans_for(setting: Setting, name: str, variant: Variant, resolution: float) -> dict[str, Any]:
    """Plans for the variant, written beside nnUNetPlans."""

    def change(config: MaskSAMConfig, unet: UNetConfig) -> MaskSAMConfig:
        config = replace(config, resolution=resolution, generator=unet if variant.unet else config.generator)
        config = variant.change(config)
        if variant.free:
            config = replace(config, num_queries=len(read_json(setting.folder / "dataset.json")["labels"]))
        return config

    return make_plans(setting.dataset, name, setting.patch, change if variant.trainer == MASKSAM else None)


def train(variant: Variant, setting: Setting, plans: dict[str, Any], fold: int, seed: int) -> Any:
    """Train and validate; the trainer."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    base = recursive_find_trainer_class_by_name(variant.trainer)

    def on_train_start(self: Any) -> None:
        base.on_train_start(self)
        variant.prepare(self)
        torch.manual_seed(seed)
        np.random.seed(seed)

    trainer_class = type(base.__name__, (base,), {"on_train_start": on_train_start})
    torch.manual_seed(seed)
    np.random.seed(seed)
    given = plans | {"continue_training": False}, configuration_of(setting.patch), fold
    trainer = trainer_class(*given, read_json(setting.folder / "dataset.json"), torch.device("cpu"))
    for name, value in variant.settings.items():
        setattr(trainer, name, value)
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer


def main(variant: str, setting: str, fold: int, iterations: int, seed: int, resolution: float | None) -> None:
    chosen, where = VARIANTS[variant], SETTINGS[setting]
    os.environ |= {BUDGET_ITERATIONS: str(iterations), "nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"}
    if chosen.random:
        os.environ[RANDOM_INIT] = "1"
    r = where.resolution if resolution is None else resolution
    plans = plans_for(where, f"Variant_{variant}_{setting}_{r:g}_{iterations}_{seed}", chosen, r)
    trainer = train(chosen, where, plans, fold, seed)
    output = Path(trainer.output_folder)
    stats, summary = read_json(output / "training_stats.json"), read_json(output / "validation" / "summary.json")
    row = {
        "variant": variant,
        "data": setting,
        "fold": fold,
        "iterations": iterations,
        "seed": seed,
        "resolution": r,
        "dice": round(summary["foreground_mean"]["Dice"], 4),
        "classes": {name: round(values["Dice"], 4) for name, values in summary["mean"].items()},
        "seconds": round(stats["train_seconds"]),
        "version": __version__,
        "commit": git_hash(__file__),  # not the package's: that may be installed
    }
    if isinstance(trainer, MaskSAMTrainer) and (gain := trainer.sam_network.mask_head.gain) is not None:
        row["gain"] = round(gain.abs().mean().item(), 4)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    for file in output.glob("checkpoint_*.pth"):  # the log stays
        file.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--fold", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=float)
    main(**vars(parser.parse_args()))
