"""What ``masksam predict`` has beside nnU-Net's arguments. Heavy imports inside, as in ``cli``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import typer

from masksam_nnunet.errors import MaskSAMError

from .fail import fail

BATCH_SIZE, ENSEMBLE, POSTPROCESSING, KEEP, MODEL = (
    "--batch-size", "--ensemble", "--postprocessing", "--keep-probabilities", "--model"
)  # fmt: skip
HELP = f"""
of masksam predict, beside nnU-Net's:
  {BATCH_SIZE} N        Windows and their mirrors that go through the network at once. Default: chosen from the device
                        and the patch. Halved when the GPU's memory runs out.
  {ENSEMBLE} TRAINER[@PLANS][:CONFIGURATION] ...
                        Average the probabilities of several models, for example {ENSEMBLE}
                        nnUNetTrainer@nnUNetPlans:3d_fullres MaskSAMTrainer@MaskSAMPlans:3d_fullres; names as in
                        masksam benchmark --trainers, -p and -c for those that name none, -f for all; instead of -tr.
  {MODEL} FOLDER        Predict with a portable model, which masksam export --format safetensors or masksam import
                        --unpack wrote; instead of -d, -tr, -p, -c and -chk. All of its folds unless -f names some.
  {POSTPROCESSING} FILE|auto
                        Apply a postprocessing.pkl of nnU-Net; auto: the one that its cross-validation wrote for this
                        model or pair and these folds.
  {KEEP}  The same as --save_probabilities.

A case that cannot be predicted does not stop the others; the command then ends with their list and exit code 1, and
--continue_prediction predicts what lacks, and label maps that are damaged, again."""


@dataclass(frozen=True)
class Options:
    """Values of the options that nnU-Net's command does not know."""

    batch_size: int | None = None
    ensemble: tuple[str, ...] = ()
    postprocessing: str | None = None
    model: str | None = None
    all_folds: bool = False
    """Whether none was named; nnU-Net's command then says 0 to 4."""


@dataclass
class _Named:
    """The model that nnU-Net's options name."""

    values: tuple[str, ...] = field(default=())

    def folder(self, *values: str) -> str:
        """Stands in nnU-Net's command for what finds the folder, given -d, -tr, -p and -c."""
        self.values = values
        return ""


def take_options(arguments: Sequence[str]) -> tuple[list[str], Options]:
    """Split ``arguments`` into nnU-Net's and the others.

    Of an option given twice the last counts, as in argparse; what ``--ensemble`` names adds up.
    """
    rest: list[str] = []
    found: dict[str, Any] = {}
    words = list(arguments)
    while words:
        name, equals, value = (word := words.pop(0)).partition("=")
        given = [value] if equals else []
        if name == ENSEMBLE:
            while not equals and words and not words[0].startswith("-"):
                given.append(words.pop(0))
            found["ensemble"] = (*found.get("ensemble", ()), *given)
            if not any(given):
                fail(f"{ENSEMBLE} names no model: write two or more, TRAINER[@PLANS][:CONFIGURATION]")
        elif name in (BATCH_SIZE, POSTPROCESSING, MODEL):
            value = value if equals else words.pop(0) if words else ""
            found[name.strip("-").replace("-", "_")] = _positive(value) if name == BATCH_SIZE else _file(name, value)
        else:
            rest.append("--save_probabilities" if word == KEEP else word)
    if "ensemble" in found:
        # nnU-Net's command insists on them; here they name nothing, unless the user gives -c too.
        rest = ["-c", "", "-tr", ENSEMBLE.strip("-"), *rest]
    if "model" in found:
        found["all_folds"] = not any(word.startswith("-f") for word in rest)
        rest = ["-d", "", "-c", "", "-tr", MODEL.strip("-"), *rest]
    return rest, Options(**found)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        fail(
            f"{BATCH_SIZE} = {text!r} must be a positive whole number: how many windows go through the network at "
            "once; leave the option out to have it chosen"
        )
    return int(text)


def _file(option: str, text: str) -> str:
    if not text or text.startswith("-"):
        wanted = {POSTPROCESSING: "a postprocessing.pkl of nnU-Net, or auto", MODEL: "a portable model's folder"}
        fail(f"{option} = {text!r}: give {wanted[option]}")
    return text


@contextmanager
def masksam_predictor(nnunet: ModuleType, options: Options, show_help: bool = False) -> Iterator[None]:
    """While it lasts, nnU-Net's command in the module ``nnunet`` parses and ``PredictCommand`` predicts."""
    from masksam_nnunet.inference.predict.command import PredictCommand

    named = _Named()
    ours = {
        "nnUNetPredictor": partial(PredictCommand, partial(_models, named, options), options.batch_size),
        "get_output_folder": named.folder,
        "maybe_mkdir_p": lambda _: None,  # the output folder is made when all else has been checked
    }
    theirs = {name: getattr(nnunet, name) for name in ours}
    vars(nnunet).update(ours)
    try:
        yield
    except MaskSAMError as error:
        fail(str(error))
    finally:
        vars(nnunet).update(theirs)
        if show_help:
            typer.echo(HELP)


def _models(named: _Named, options: Options, folds: Sequence[int | str], checkpoint: str) -> tuple[Any, Any]:
    """The models to predict with, and the post-processing or None."""
    from masksam_nnunet.inference.predict.sources import find_sources, portable_source

    dataset, trainer, plans, configuration = named.values
    if options.model is not None:
        if options.ensemble or (dataset, trainer, configuration) != ("", MODEL.strip("-"), ""):
            fail(f"{MODEL} {options.model} names the model: leave -d, -tr, -c and {ENSEMBLE} out")
        return portable_source(options.model, None if options.all_folds else folds, options.postprocessing)
    if options.ensemble and trainer != ENSEMBLE.strip("-"):
        fail(f"-tr {trainer}: {ENSEMBLE} names the trainers; leave -tr out")
    return find_sources(
        dataset, trainer, plans, configuration, folds, checkpoint, options.ensemble, options.postprocessing
    )
