"""Where trained models lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from masksam_nnunet.errors import ModelError


def find_models(
    dataset: str, trainer: str, plans: str, configurations: Sequence[str] | None = None
) -> tuple[Path, list[Path]]:
    """nnU-Net's results folder, and in it the folders of the models, ``TRAINER__PLANS__CONFIGURATION``.

    Args:
        dataset: number or name.
        trainer: the trainer's class.
        plans: name of the plans.
        configurations: all that were trained if not given.

    Raises:
        ModelError: there is no such dataset or model; the message lists the models that there are.
    """
    if not os.environ.get("nnUNet_results"):
        raise ModelError("nnUNet_results not set: trained models are looked for there; export it first")
    results = Path(os.environ["nnUNet_results"])
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"-d {dataset}: {' '.join(str(error).split())}") from error
    trained = {folder.name.split("__")[2]: folder for folder in (results / name).glob(f"{trainer}__{plans}__*")}
    missing = [wanted for wanted in configurations or () if wanted not in trained]
    if missing or not trained:
        others = sorted(folder.name for folder in (results / name).glob("*__*__*"))
        raise ModelError(
            f"{results / name} holds no model {' or '.join(f'{trainer}__{plans}__{c}' for c in missing or '*')}; there "
            f"are: {', '.join(others) or 'none'}. Name another one (-tr, -p, -c), or train it"
        )
    return results, [trained[wanted] for wanted in configurations or sorted(trained)]
