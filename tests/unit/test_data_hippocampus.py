"""`masksam data hippocampus`: fetched over loopback, verified, unpacked without leaving its folder, converted."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from challenge_replicas import build_msd, nnunet_folders, same_volume, tar_of
from loopback import Server, serving
from typer.testing import CliRunner, Result

from masksam_nnunet import download
from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.datasets import msd
from masksam_nnunet.plans.datasets.msd import get_hippocampus

FILE = "Task04_Hippocampus.tar"


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    return nnunet_folders(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_msd(tmp_path_factory.mktemp("msd"))


@pytest.fixture(scope="module")
def body(task: Path) -> bytes:
    return tar_of(task)


@pytest.fixture
def server(body: bytes) -> Iterator[Server]:
    with serving(FILE, body) as running:
        yield running


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def cached() -> set[str]:
    return {path.name for path in download.cache_dir().iterdir() if not path.name.endswith(".lock")}


def test_fetch_verify_convert(server: Server, body: bytes, task: Path, raw: Path, tmp_path: Path) -> None:
    get = partial(get_hippocampus, md5=md5(body))
    server.answers = ["break", 503]
    folder = get(url=server.url)
    assert folder == raw / "Dataset004_Hippocampus"
    assert [path.name for path in raw.iterdir()] == [folder.name]
    assert len(list((folder / "labelsTr").iterdir())) == 5
    assert same_volume(folder / "labelsTr" / "hippocampus_006.nii.gz", task / "labelsTr" / "hippocampus_006.nii.gz")
    assert len(server.ranges) == 3 and server.ranges[2] == server.ranges[1] != "bytes=0-"  # resumed
    assert cached() == {FILE}

    with pytest.raises(DataError, match=r"-d 4 .*Dataset004_Hippocampus"):
        get(url=server.url)
    other = get(url=server.url, dataset_id=44, out=tmp_path / "elsewhere")
    assert other == tmp_path / "elsewhere" / "Dataset044_Hippocampus" and other.is_dir()
    assert len(server.ranges) == 3  # from the cache


def test_a_damaged_file_leaves_nothing(server: Server, body: bytes, raw: Path, tmp_path: Path) -> None:
    server.body = body[:-512] + b"x" * 512
    with pytest.raises(DataError, match=f"{server.url}.*{md5(body)}"):
        get_hippocampus(url=server.url, md5=md5(body))
    assert cached() == set() and not raw.exists()
    source = tmp_path / "mine.tar"
    source.write_bytes(server.body)
    with pytest.raises(DataError, match=r"mine\.tar"):
        get_hippocampus(source=source, md5=md5(body))
    assert source.exists() and cached() == set() and not raw.exists()


def test_the_target_is_looked_at_before_the_download(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw / "Dataset004_Other").mkdir(parents=True)
    with pytest.raises(DataError, match="Dataset004_Other"):
        get_hippocampus(url=server.url)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(DataError, match="nnUNet_raw"):
        get_hippocampus(url=server.url)
    assert server.ranges == []


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "extra",
    [
        member("Task04_Hippocampus/../../outside"),
        member("Task04_Hippocampus/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("Task04_Hippocampus/link", tarfile.LNKTYPE, "Task04_Hippocampus/dataset.json"),
        member("Task04_Hippocampus/pipe", tarfile.FIFOTYPE),
    ],
)
def test_nothing_is_unpacked_elsewhere(task: Path, raw: Path, tmp_path: Path, extra: tarfile.TarInfo) -> None:
    content = tar_of(task, extra)
    source = tmp_path / FILE
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"Task04_Hippocampus\.tar"):
        get_hippocampus(source=source, md5=md5(content))
    assert not list(raw.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Task04_Hippocampus.tar", "cache", "nnUNet_raw"]


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", "hippocampus", *arguments])


def test_the_command(server: Server, body: bytes, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msd, "get_hippocampus", partial(get_hippocampus, md5=md5(body)))
    done = invoke("--url", server.url)
    assert (done.exit_code, done.stdout) == (0, f"{raw / 'Dataset004_Hippocampus'}\n")
    (tmp_path / "f.tar").write_bytes(body)
    assert invoke("-d", "7", "--out", str(tmp_path / "o"), "--from", str(tmp_path / "f.tar")).exit_code == 0
    assert (tmp_path / "o" / "Dataset007_Hippocampus").is_dir()
    failed = invoke("--url", server.url)
    assert (failed.exit_code, failed.stdout) == (1, "") and failed.stderr.startswith("error: -d 4 ")
    assert invoke("--from", "f.tar", "--url", server.url).exit_code == 2
