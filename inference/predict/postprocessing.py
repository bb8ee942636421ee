"""nnU-Net's post-processing: find what its cross-validation chose, read it safely, apply it to a label map."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from nnunetv2.postprocessing.remove_connected_components import load_postprocess_save
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string, get_ensemble_name

from masksam_nnunet.errors import UsageError, in_short

FILE = "postprocessing.pkl"
"""nnU-Net's name."""
_FUNCTIONS = "nnunetv2.postprocessing.remove_connected_components"
_NUMBERS = {"scalar": ("numpy.core.multiarray", "numpy._core.multiarray"), "dtype": ("numpy",)}


@dataclass(frozen=True)
class Postprocessing:
    """The functions of nnU-Net that a file names, each with its arguments; none where nothing helped."""

    file: Path
    functions: Sequence[Callable[..., Any]]
    arguments: Sequence[Mapping[str, Any]]

    def apply(self, label_map: Path, reader: Any) -> None:
        """Process a file in place."""
        if self.functions:
            load_postprocess_save(str(label_map), str(label_map), reader, list(self.functions), list(self.arguments))


def read_postprocessing(file: Path) -> Postprocessing:
    """Read nnU-Net's ``postprocessing.pkl``, a pickle; only nnU-Net's functions and numbers are unpickled.

    Raises:
        UsageError: it is missing, damaged, or holds anything else.
    """
    try:
        with file.open("rb") as stream:
            functions, arguments = _Reader(stream).load()
        if len(functions) != len(arguments) or not all(map(callable, functions)):
            raise ValueError("it holds no functions with arguments")
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(
            f"--postprocessing {file}: not a {FILE} of nnU-Net ({in_short(error)}); name one that "
            "nnUNetv2_find_best_configuration or nnUNetv2_determine_postprocessing wrote"
        ) from error
    return Postprocessing(file, functions, arguments)


def find_postprocessing(models: Sequence[Path], folds: Sequence[int | str]) -> Postprocessing:
    """Find what nnU-Net chose for one model's folder or for a pair, from the cross-validation of these folds.

    Raises:
        UsageError: there is none.
    """
    numbers = [fold for fold in folds if isinstance(fold, int)]
    if len(models) > 2 or len(numbers) < len(folds):
        raise UsageError(
            f"--postprocessing auto: nnU-Net determines it for numbered folds of one model or a pair, not for "
            f"{len(models)} models with folds {' '.join(map(str, folds))}; name a {FILE}"
        )
    if len(models) == 1:
        places = [models[0] / f"crossval_results_folds_{folds_tuple_to_string(numbers)}"]
    else:  # named by either order
        pairs = permutations(map(str, models))
        places = [models[0].parent / "ensembles" / get_ensemble_name(*pair, tuple(numbers)) for pair in pairs]
    for file in (place / FILE for place in places):
        if file.is_file():
            return read_postprocessing(file)
    raise UsageError(
        f"--postprocessing auto: there is no {' or '.join(str(place / FILE) for place in places)}; run "
        "nnUNetv2_find_best_configuration or masksam benchmark for these models and folds"
    )


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        wanted = module == _FUNCTIONS and name.startswith("remove_all_but_largest")
        if not wanted and module not in _NUMBERS.get(name, ()):
            raise pickle.UnpicklingError(f"it would import {module}.{name}, which nnU-Net's files never do")
        return getattr(importlib.import_module(module), name)
