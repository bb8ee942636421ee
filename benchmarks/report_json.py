"""The benchmark's results as JSON."""

from __future__ import annotations

from typing import Any

from masksam_nnunet.inference.report.html import plain

from .results import BenchmarkResults

SCHEMA_VERSION = 1
"""Rises when a field changes its meaning or goes; new fields may come without."""


def to_json(results: BenchmarkResults) -> dict[str, Any]:
    """All that was found, by the field names of :mod:`.results`, in plain types; NaN becomes None."""
    content: dict[str, Any] = plain(results)
    return {"schema": "masksam-benchmark", "schema_version": SCHEMA_VERSION, **content}
