"""What every HTML page is made of: numbers as text, names that may break, pictures, templates, and plain JSON."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

UNDEFINED = "\u2013"
_MINUS = "\u2212"
_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_PIECE = 24  # characters that a column of names must have room for
_LONG_WORD = 16  # characters above which a word may break before its capitals
_WORDS = re.compile(r"(?<=[\s_])(?=[^\s_])")
_HUMPS = re.compile(r"(?<=[a-z])(?<!\bnn)(?=[A-Z])")  # nnUNet stays whole


@dataclass(frozen=True)
class Picture:
    """A PNG file with its title and caption."""

    title: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The image as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def number(digits: int, signed: bool = False) -> Callable[[float], str]:
    """Make a formatter with thousands separated by thin spaces and :data:`UNDEFINED` for NaN.

    ``signed`` numbers show a plus or a real minus; what rounds to zero has no sign.
    """

    def text(value: float) -> str:
        if math.isnan(value):
            return UNDEFINED
        shown = f"{value:{'+' if signed else ''},.{digits}f}".replace(",", "\u2009")
        if signed and not shown.strip("+-0."):
            shown = shown[1:]
        return shown.replace("-", _MINUS) if signed else shown

    return text


def pieces(name: str, longest: int) -> list[str]:
    """Cut a long name, such as a trainer's, where it may go on in the next line.

    It is cut after spaces and underscores, long words before capitals, and what is longer than ``longest`` anywhere.
    """
    words = _WORDS.split(name)
    tokens = [token for word in words for token in (_HUMPS.split(word) if len(word) > _LONG_WORD else [word])]
    return [token[start : start + longest] for token in tokens for start in range(0, len(token), longest)]


def breakable(name: str) -> Markup:
    """Escape a name and mark the places where a narrow column may break it."""
    return Markup("<wbr>").join(escape(piece) for piece in pieces(name, _LONGEST_PIECE))


def environment() -> jinja2.Environment:
    """Return an environment for templates that escapes every text and fails where a variable is missing."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["breakable"] = breakable
    return made


def plain(value: Any) -> Any:
    """Turn results into types that JSON holds.

    Dataclasses and mappings become dicts, sequences lists, paths text; NaN and infinity become None.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
