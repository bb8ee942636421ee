"""pyproject.toml, requirements.lock, the import contracts and CITATION.cff agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from masksam_nnunet import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


def normalized(requirement: str) -> str:
    """The name of a requirement in the form that package indexes compare."""
    return re.sub("[-_.]+", "-", re.split(r"[\s<>=!;\[]", requirement, maxsplit=1)[0]).lower()


def locked() -> dict[str, list[str]]:
    """The requirements in the lock file, with their hashes."""
    blocks = re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", LOCK))
    return {block.split(" \\")[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})", block) for block in blocks if block}


def test_the_lock_is_exact_and_hashed_and_names_no_machine() -> None:
    assert len(locked()) > 50
    for requirement, hashes in locked().items():
        assert re.match(r"[\w.-]+==[\w.+]+( ; .+)?$", requirement), requirement
        assert hashes, requirement
    assert not re.search(r"://|file:|--index-url|--find-links|(?m:^#.*/(home|root|work|tmp)/)", LOCK)


def test_the_lock_holds_every_dependency() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {normalized(requirement) for requirement in wanted} <= {normalized(requirement) for requirement in locked()}
    assert {requirement for requirement in wanted if "==" in requirement} <= locked().keys()


def test_the_contracts_cover_the_whole_core() -> None:
    """A module that is missing from the lists could import nnU-Net unnoticed."""
    layers, core, _ = PROJECT["tool"]["importlinter"]["contracts"]
    modules = {
        path.stem
        for path in (ROOT / "masksam_nnunet").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}
    assert set(layers["layers"][-1].split(" : ")) == modules - {"cli"}
    assert {name.removeprefix("masksam_nnunet.") for name in core["source_modules"]} == modules - {"cli"}


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
