"""Shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same numbers in every run, and no GPU, which commands would measure and train on."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny networks: several threads gain nothing, and crawl on a busy machine
    yield
    torch.set_num_threads(threads)
