"""JSON files of portable models changed at random: read, or refused by name; nothing run, nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from configs import UNET
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_models import masksam_model, sign, stock_model
from mutations import mutated

from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import ModelError
from masksam_nnunet.inference.export.description import is_portable
from masksam_nnunet.inference.export.load import PortableModel
from masksam_nnunet.inference.export.write import write_portable

FILES = ("model.json", "plans.json", "dataset.json")
_EVENTS: list[str] | None = None
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _EVENTS is None:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"):
        _EVENTS.append(f"{event} {arguments!r}")
    file, _, flags = arguments if event == "open" else (0, 0, 0)
    if not isinstance(file, int) and isinstance(flags, int) and flags & _WRITING:  # a number is open already
        _EVENTS.append(f"open {file}")


sys.addaudithook(_watch)  # for good: it can only be switched off


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Programs that are started, pickles, connections, and files that are opened to be written."""
    global _EVENTS
    _EVENTS = events = []
    try:
        yield events
    finally:
        _EVENTS = None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A MaskSAM's and a U-Net's portable model."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXT_TRAINER, str(trainer_folder()))
        made = [masksam_model(root / "results", folds=1, generator=UNET), stock_model(root / "results")]
        yield [write_portable(folder, root / str(number), ("0",)).output for number, folder in enumerate(made)]


def test_the_guard_notices(tmp_path: Path) -> None:
    with watched() as events:
        (tmp_path / "file").touch()
        os.system("true")
    assert len(events) == 2


def test_changed_json(models: list[Path], tmp_path: Path) -> None:
    sound = {(n, name): json.loads((model / name).read_text()) for n, model in enumerate(models) for name in FILES}
    cases = st.sampled_from(list(sound)).flatmap(lambda key: st.tuples(st.just(key), mutated(sound[key])))

    @settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(cases)
    def check(case: tuple[tuple[int, str], Any]) -> None:
        (which, name), content = case
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models[which], folder)
        (folder / name).write_text(json.dumps(content))
        if name != "model.json":
            sign(folder)
        with watched() as events, contextlib.redirect_stdout(io.StringIO()):
            is_portable(folder)
            try:
                network, _ = PortableModel(folder).read()
                assert not any(p.is_meta for p in network.parameters())
            except ModelError as error:
                assert str(folder) in str(error)
        assert events == []

    check()
