"""How each metric is called and printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from masksam_nnunet.inference.report.html import UNDEFINED, number

from .results import Interval, Metric
from .statistics import LARGER_IS_BETTER


@dataclass(frozen=True)
class MetricStyle:
    """A metric for people.

    Attributes:
        title: its name.
        unit: empty for shares.
        digits: after the point.
        larger_is_better: which way is good.
    """

    title: str
    unit: str
    digits: int
    larger_is_better: bool

    @property
    def heading(self) -> str:
        """The name with its unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    @property
    def arrow(self) -> str:
        """Which way is good, as a sign."""
        return "↑" if self.larger_is_better else "↓"

    def text(self, signed: bool = False) -> Callable[[float], str]:
        """The formatter of a value, or of a difference of two."""
        return number(self.digits, signed)

    def interval(self, interval: Interval, signed: bool = False) -> str:
        """``[low, high]``; empty where there is no estimate, a dash where there is one only."""
        if math.isnan(interval.estimate):
            return ""
        if math.isnan(interval.low) or math.isnan(interval.high):
            return f"[{UNDEFINED}]"
        text = self.text(signed)
        return f"[{text(interval.low)}, {text(interval.high)}]"

    def with_interval(self, interval: Interval, signed: bool = False) -> str:
        """The estimate and its interval in one text."""
        return f"{self.text(signed)(interval.estimate)} {self.interval(interval, signed)}".rstrip()


STYLES: Mapping[Metric, MetricStyle] = {
    "dice": MetricStyle("Dice", "", 3, LARGER_IS_BETTER["dice"]),
    "hd95_mm": MetricStyle("HD95", "mm", 2, LARGER_IS_BETTER["hd95_mm"]),
    "surface_dice": MetricStyle("Surface Dice", "", 3, LARGER_IS_BETTER["surface_dice"]),
    "volume_error_ml": MetricStyle("Absolute volume error", "ml", 2, LARGER_IS_BETTER["volume_error_ml"]),
}
