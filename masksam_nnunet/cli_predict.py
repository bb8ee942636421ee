"""What ``masksam predict`` has beside nnU-Net's arguments. Heavy imports inside, as in ``cli``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import typer

from masksam_nnunet.cli_fail import fail

OPTION = "--batch-size"
HELP = f"""
of masksam predict, beside nnU-Net's:
  {OPTION} N        Windows and their mirrors that go through the network at once. Default: chosen from the device
                        and the patch. Halved when the GPU's memory runs out."""


def take_batch_size(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """Split ``arguments`` into nnU-Net's and the value of ``--batch-size``; the last one counts, as in argparse."""
    rest: list[str] = []
    size: int | None = None
    words = iter(arguments)
    for word in words:
        if word == OPTION:
            size = _positive(next(words, ""))
        elif word.startswith(f"{OPTION}="):
            size = _positive(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, size


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        fail(
            f"{OPTION} = {text!r} must be a positive whole number: how many windows go through the network at once; "
            "leave the option out to have it chosen"
        )
    return int(text)


@contextmanager
def masksam_predictor(nnunet: ModuleType, batch_size: int | None, show_help: bool = False) -> Iterator[None]:
    """While it lasts, nnU-Net's command in the module ``nnunet`` predicts with ``MaskSAMPredictor``."""
    from masksam_nnunet.inference.predictor import MaskSAMPredictor

    class Predictor(MaskSAMPredictor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, batch_size=batch_size, **kwargs)

    theirs = nnunet.nnUNetPredictor
    nnunet.nnUNetPredictor = Predictor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        nnunet.nnUNetPredictor = theirs  # type: ignore[attr-defined]
        if show_help:
            typer.echo(HELP)
