"""Portable models changed at random: read, or refused by name; nothing run, nothing written outside."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from portable_models import masksam_model, sign, stock_model

from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import ModelError
from masksam_nnunet.inference.export.description import is_portable
from masksam_nnunet.inference.export.load import read_model
from masksam_nnunet.inference.export.write import write_portable

EXAMPLES = 150
FILES = ("model.json", "plans.json", "dataset.json")
BROKEN = (KeyError, TypeError, AttributeError, ValueError, OSError)
"""What the changes themselves may run into, in JSON that is changed."""

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
    """A MaskSAM's and a U-Net's portable model, each of two folds."""
    root = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv(EXT_TRAINER, str(trainer_folder()))
        made = [masksam_model(root / "results"), stock_model(root / "results")]
        yield [write_portable(folder, root / str(number), ("0", "1")).output for number, folder in enumerate(made)]
    torch.set_num_threads(threads)


def read(folder: Path) -> bool:
    """Whether the model can be read; if not, it is refused with an error that names it."""
    before = {file.name: file.stat().st_mtime_ns for file in folder.parent.rglob("*")}
    with watched() as events, contextlib.redirect_stdout(io.StringIO()):
        is_portable(folder)
        try:
            model = read_model(folder)
        except ModelError as error:
            assert str(folder) in str(error)
            model = None
    assert events == []
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.parent.rglob("*")}
    assert model is None or not any(p.is_meta for p in model.network.parameters())
    return model is not None


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        yield Path(shutil.copytree(folder, Path(root) / "model"))


# ---- changes ---------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.floats(), st.text(max_size=5),
    st.sampled_from([
        2**31, 2**63, -(2**70), 10**400, 1e308, 0.5, [], {}, [[]], [0], [1, 2, 3], {"a": 0}, {"0": {}}, [None] * 3,
        "os.system", "torch.load", "torch.nn.Conv3d", "numpy", "..", "/etc/passwd", "../../x", "a\0b", "\ud800", "all",
        "nnUNetTrainer", "DefaultPreprocessor", "isfile", "np", "torch", ".nii.gz", "2d", "3d_fullres",
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet", "masksam_nnunet.modeling.MaskSAM",
    ]),
)  # fmt: skip
ACTIONS = st.sampled_from(("replace", "replace", "replace", "delete", "add"))
CHANGES = st.lists(st.tuples(st.integers(0, 2**32), ACTIONS, LEAVES), min_size=1, max_size=3)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "flip", "set", "cut", "insert", "repeat")),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All paths in a JSON value."""
    if path:
        yield path
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*path, key))


def change(content: Any, seed: int, action: str, value: Any) -> Any:
    """A copy with one place changed."""
    result = copy.deepcopy(content)
    every = list(places(result))
    if not every:
        return value
    rng = random.Random(seed)
    *above, last = rng.choice(every)
    place = result
    for key in above:
        place = place[key]
    if action == "replace":
        place[last] = value
    elif action == "delete":
        del place[last]
    elif action == "add" and isinstance(place[last], (dict, list)):
        place[last] = {**place[last], "more": value} if isinstance(place[last], dict) else [*place[last], value]
    return result


def edited(content: bytes, edits: list[tuple[str, float, bytes, bool]], head: int) -> bytes:
    """``content`` changed at some shares of it, or of its first ``head`` bytes."""
    result = bytearray(content)
    for kind, share, value, at_head in edits:
        place = int(share * (min(head, len(result)) if at_head else len(result)))
        if kind == "cut":
            del result[place:]
        elif kind == "insert":
            result[place:place] = value
        elif kind == "repeat":
            result[place:place] = result[place : place + 100 * len(value)]
        elif kind == "flip" and place < len(result):
            result[place] ^= 1 << (value[0] % 8)
        else:
            result[place : place + len(value)] = value
    return bytes(result)


# ---- kinds of input --------------------------------------------------------------------------------------------------


def json_files(models: list[Path], which: int, changes: dict[str, Any], follow: bool) -> None:
    with copied(models[which]) as folder:
        for name in FILES:
            content = json.loads((folder / name).read_text())
            for seed, action, value in changes.get(name, []):
                content = change(content, seed, action, value)
            (folder / name).write_text(json.dumps(content))
            if name == "plans.json" and follow:
                with contextlib.suppress(*BROKEN):
                    # As in a model that was made so: the description says what the plans say.
                    description = json.loads((folder / "model.json").read_text())
                    description["network"] = content["configurations"]["3d_fullres"]["architecture"]
                    (folder / "model.json").write_text(json.dumps(description))
        with contextlib.suppress(*BROKEN):
            sign(folder)
        read(folder)


def file_bytes(models: list[Path], which: int, name: str, edits: Any, signed: bool) -> None:
    with copied(models[which]) as folder:
        file = folder / name
        if not file.exists():  # the U-Net's folds share nothing
            file = folder / "fold_0.safetensors"
        before = file.read_bytes()
        head = 8 + struct.unpack("<Q", before[:8])[0] if file.suffix == ".safetensors" else len(before)
        after = edited(before, edits, head)
        file.write_bytes(after)
        if signed and file.name != "model.json":
            sign(folder)
        sound = read(folder)
        assert not sound or signed or after == before or file.name == "model.json", "a changed file passed as the first"


ONE = st.integers(0, 1)
KINDS: dict[Callable[..., None], dict[str, st.SearchStrategy[Any]]] = {
    json_files: {
        "which": ONE,
        "changes": st.dictionaries(st.sampled_from(FILES), CHANGES, min_size=1, max_size=2),
        "follow": st.booleans(),
    },
    file_bytes: {
        "which": ONE,
        "name": st.sampled_from((*FILES, "fold_0.safetensors", "fold_1.safetensors", "shared.safetensors")),
        "edits": EDITS,
        "signed": st.sampled_from((True, True, True, False)),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_models(kind: Callable[..., None], models: list[Path]) -> None:
    health = list(HealthCheck)

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=health, database=None)
    @given(**KINDS[kind])
    def check(**drawn: Any) -> None:
        kind(models, **drawn)

    check()
