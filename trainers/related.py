"""Trainers of the related methods, three for each: ``SAMedTrainer``, ``SAMedTrainer_author``, ``SAMedTrainer_budget``.

The first is trained as MaskSAM is, for comparisons that differ in nothing else; the second as its authors train it.
Epochs, patches and batches are those of the plans, folds nnU-Net's.
"""

from __future__ import annotations

from masksam_nnunet.method import MASKSAM, Method, methods

from .masksam import MaskSAMTrainer
from .time_budget import MaskSAMTrainer_budget
from .variants import AuthorsTrainer


def _trainer(method: Method, base: type[MaskSAMTrainer], suffix: str) -> type[MaskSAMTrainer]:
    """A trainer of a method; checkpoints and nnU-Net know it by its name in this module."""
    text = f"{method.source}{suffix.replace('_', ': ')}."
    return type(method.trainer + suffix, (base,), {"method": method.name, "__module__": __name__, "__doc__": text})


_MADE = [
    _trainer(method, base, suffix)
    for method in methods().values()
    if method.name != MASKSAM
    for base, suffix in ((MaskSAMTrainer, ""), (AuthorsTrainer, "_author"), (MaskSAMTrainer_budget, "_budget"))
]
globals().update({trainer.__name__: trainer for trainer in _MADE})
__all__ = [trainer.__name__ for trainer in _MADE]
