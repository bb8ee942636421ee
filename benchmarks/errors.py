"""What goes wrong in a benchmark and the user can mend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from masksam_nnunet.errors import BenchmarkError


def refuse_unfair(reasons: Sequence[str], accept_unfair: bool, what: str, mend: str) -> None:
    """Stop where severe findings are not accepted.

    Args:
        reasons: severe findings, in words.
        accept_unfair: whether the user insists.
        what: is not fair: the beginning of the message.
        mend: the remedy beside ``--accept-unfair``.

    Raises:
        BenchmarkError: with all reasons.
    """
    if reasons and not accept_unfair:
        raise BenchmarkError(
            f"{what}:\n"
            + "\n".join(f"- {text}" for text in reasons)
            + f"\n{mend}, or give --accept-unfair to have a report that opens with these reasons."
        )


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted; ``none`` where there are none."""
    return ", ".join(sorted(names)) or "none"
