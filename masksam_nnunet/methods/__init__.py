"""Methods that adapt SAM, each declared in a file of its own: its parts, and its authors' recipe."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for module in iter_modules(__path__)
    for method in import_module(f"{__name__}.{module.name}").METHODS
}
"""Every method by its name."""
