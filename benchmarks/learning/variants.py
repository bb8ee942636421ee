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
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from masksam_nnunet import __version__
from masksam_nnunet.config import MaskSAMConfig, UNetConfig
from masksam_nnunet.environment import BUDGET_ITERATIONS, RANDOM_INIT
from masksam_nnunet.files import read_json
from masksam_nnunet.losses.matching import Matches
from masksam_nnunet.plans.architecture import DECISIONS, config_of_plans, unet_config, write_config

RESULTS = Path(__file__).with_name("results.jsonl")
BATCH_SIZE = 2
MASKS = dict.fromkeys(("mask_bce", "mask_dice", "aux_bce", "aux_dice"), 0.0)
MASKSAM, NNUNET = "MaskSAMTrainer_lite_medsam_budget", "nnUNetTrainer_adamw_budget"


@dataclass(frozen=True)
class Setting:
    """A dataset, and what all variants see of it."""

    dataset: str
    patch: tuple[int, int, int]
    resolution: float


SETTINGS = {
    "acdc": Setting("Dataset027_ACDC", (4, 160, 160), 0.5),
    "hippocampus": Setting("Dataset004_Hippocampus", (8, 56, 40), 1),
    "chaos": Setting("Dataset101_CHAOST2", (4, 192, 192), 0.5),
}

Change = Callable[[MaskSAMConfig], MaskSAMConfig]


@dataclass(frozen=True)
class Variant:
    """What differs from the light generator with all its parts."""

    text: str
    """The same in words."""
    change: Change = lambda config: config
    unet: bool = False
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


def _both(first: Change, second: Change) -> Change:
    return lambda config: second(first(config))


def _no_gain(trainer: Any) -> None:
    trainer.masksam.mask_head.gain.requires_grad_(False)


def _random_decoder(trainer: Any) -> None:
    for part in (trainer.masksam.mask_decoder, trainer.masksam.prompt_encoder):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not module.weight.requires_grad:
                module.reset_parameters()


def _rates(rate: float, warmup: int = 30) -> Callable[[Any], None]:
    def prepare(trainer: Any) -> None:
        trainer.initial_lr, trainer.warmup_iterations = rate, warmup

    return prepare


def _match_by_class(trainer: Any) -> None:
    """Free queries, each of which is given the targets of one class."""
    trainer.criterion.assign = lambda cost, targets: Matches.of_classes(targets)


def _match_by_slice(trainer: Any) -> None:
    """Queries of classes with dense maps, but matched to targets of any class."""
    judge = trainer.criterion
    judge.config = replace(judge.config, matching="slice", num_queries=judge.num_classes)


VARIANTS = {
    "nnunet_adamw": Variant("nnU-Net with AdamW, same patch and batch", trainer=NNUNET),
    "nnunet_sgd": Variant("nnU-Net, same patch and batch", trainer="nnUNetTrainer_budget"),
    "paper": Variant(
        "8 free queries, matched by slice", lambda config: replace(config, matching="slice", num_queries=8)
    ),
    "anchors_without_maps": Variant("free queries, each given one class", _free, prepare=_match_by_class, free=True),
    "maps_without_anchors": Variant("queries of classes, matched by slice", prepare=_match_by_slice),
    "light": Variant("the default"),
    "light_rate_2": Variant("learning rate 2e-3", prepare=_rates(2e-3)),
    "light_rate_3": Variant("learning rate 3e-3", prepare=_rates(3e-3)),
    "light_warmup_10": Variant("warm-up of 10 iterations", prepare=_rates(1e-3, 10)),
    "light_two_queries": Variant("two queries a class", lambda config: replace(config, num_queries=2)),
    "light_without_dense_loss": Variant("no loss on the generator's maps", _loss(generator=0.0)),
    "light_without_aux": Variant("no auxiliary mask losses", _loss(aux_bce=0.0, aux_dice=0.0)),
    "light_without_masks": Variant("no mask losses", _loss(**MASKS)),
    "light_without_gain": Variant("SAM's masks never added (gain 0)", prepare=_no_gain),
    "light_random_decoder": Variant("SAM's decoder with random weights", prepare=_random_decoder),
    "light_random": Variant("all of SAM with random weights", random=True),
    "light_forward_only": Variant("no adapters in the encoder", _forward_only),
    "unet": Variant("nnU-Net's U-Net with SAM's features, no adapters in the encoder", _forward_only, unet=True),
    "unet_adapters": Variant("the same with adapters", unet=True),
    "unet_random": Variant("the same with SAM's weights random", _forward_only, unet=True, random=True),
    "unet_without_gain": Variant("the same, SAM's masks never added", _forward_only, unet=True, prepare=_no_gain),
    "unet_without_masks": Variant("the same without mask losses", _both(_forward_only, _loss(**MASKS)), unet=True),
}


def make_plans(setting: Setting, name: str, variant: Variant, resolution: float) -> dict[str, Any]:
    """Plans for the variant, written beside nnUNetPlans, whose preprocessed data they use."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / setting.dataset
    plans = read_json(folder / "nnUNetPlans.json")
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": list(setting.patch), "batch_size": BATCH_SIZE}
    unet = unet_config(configuration["spacing"], setting.patch)
    if variant.trainer == MASKSAM:
        description = read_json(folder / "dataset.json")
        config = config_of_plans(plans, "3d_fullres", description, "lite_medsam")
        config = variant.change(replace(config, resolution=resolution, **({"generator": unet} if variant.unet else {})))
        if variant.free:
            config = replace(config, num_queries=len(description["labels"]))
        write_config(plans, "3d_fullres", config)
    else:
        configuration["architecture"]["arch_kwargs"] |= _nnunet_sizes(unet)
    plans |= {"plans_name": name, DECISIONS: {}}
    (folder / f"{name}.json").write_text(json.dumps(plans))
    return plans


def _nnunet_sizes(unet: UNetConfig) -> dict[str, Any]:
    stages = len(unet.features)
    return {
        "n_stages": stages,
        "features_per_stage": list(unet.features),
        "kernel_sizes": [list(sizes) for sizes in unet.kernel_sizes],
        "strides": [list(sizes) for sizes in unet.strides],
        "n_conv_per_stage": list(unet.blocks),
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }


def train(name: str, variant: Variant, setting: Setting, plans: dict[str, Any], fold: int, seed: int) -> Any:
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
    folder = Path(os.environ["nnUNet_preprocessed"]) / setting.dataset
    plans = plans | {"continue_training": False}
    trainer = trainer_class(plans, "3d_fullres", fold, read_json(folder / "dataset.json"), torch.device("cpu"))
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer


def main(variant: str, setting: str, fold: int, iterations: int, seed: int, resolution: float | None) -> None:
    chosen, where = VARIANTS[variant], SETTINGS[setting]
    os.environ |= {BUDGET_ITERATIONS: str(iterations), "nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"}
    if chosen.random:
        os.environ[RANDOM_INIT] = "1"
    r = where.resolution if resolution is None else resolution
    plans = make_plans(where, f"Variant_{variant}_{r:g}_{iterations}_{seed}", chosen, r)
    trainer = train(variant, chosen, where, plans, fold, seed)
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
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    shutil.rmtree(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--fold", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=float)
    main(**vars(parser.parse_args()))
