"""What every HTML page of ours is made of: numbers, cells, pictures, the template's environment."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from .text_pieces import pieces

UNDEFINED = "\u2013"
_LONGEST_PIECE = 24  # characters that a column of names must have room for
_MINUS = "\u2212"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows."""

    title: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The image as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Cell:
    """One number of a table as text, and whether it is the row's best."""

    text: str
    best: bool = False


def number(digits: int, signed: bool = False) -> Callable[[float], str]:
    """A formatter with thousands separated by thin spaces; :data:`UNDEFINED` for NaN.

    ``signed`` numbers show a plus too, and a real minus; what rounds to nothing has no sign.
    """

    def text(value: float) -> str:
        if math.isnan(value):
            return UNDEFINED
        shown = f"{value:{'+' if signed else ''},.{digits}f}".replace(",", "\u2009")
        if signed and not shown.strip("+-0."):
            shown = shown[1:]
        return shown.replace("-", _MINUS) if signed else shown

    return text


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    if math.isnan(p):
        return UNDEFINED
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def breakable(name: str) -> Markup:
    """``name``, escaped, with places where a narrow column may break it."""
    return Markup("<wbr>").join(escape(piece) for piece in pieces(name, _LONGEST_PIECE))


def environment() -> jinja2.Environment:
    """For templates that escape every text, and fail where one is missing; with the filter ``breakable``."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["breakable"] = breakable
    return made
