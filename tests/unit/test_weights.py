"""SAM checkpoints: fetched over a loopback server that misbehaves, found and verified."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from loopback import Server, serving
from small_sam import expect_release

from masksam_nnunet import download
from masksam_nnunet import sam_weights as weights
from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.errors import WeightsError
from masksam_nnunet.sam_files import CHECKPOINTS, seen_before

BODY = bytes(range(256)) * 2048  # 512 KiB: several chunks
FILE = weights.released("vit_b").file_name


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine, a cache of the test's own, no pauses between attempts."""
    for name in ("MASKSAM_WEIGHTS", "MASKSAM_WEIGHTS_SHA256", "MASKSAM_WEIGHTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    expect_release(monkeypatch, "vit_b", BODY)


def part_file() -> Path:
    return weights.cache_dir() / f"{FILE}.part"


def cached_names() -> set[str]:
    """What a fetch left behind, its lock apart."""
    return {path.name for path in weights.cache_dir().iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(FILE, BODY) as running:
        yield running


fetch = partial(weights.fetch, "vit_b")


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_fetch_puts_the_verified_file_in_the_cache_and_does_not_fetch_it_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(url=server.url)
    assert path == weights.cache_dir() / FILE
    assert path.read_bytes() == BODY
    assert cached_names() == {FILE}
    assert fetch(url=server.url) == path
    assert server.ranges == [None]
    path.write_bytes(BODY[:100])
    monkeypatch.setenv("MASKSAM_WEIGHTS_URL", server.url.removesuffix(FILE))  # a mirror's folder
    assert fetch().read_bytes() == BODY  # a damaged file is fetched again
    part_file().write_bytes(b"old")
    fetch(force=True)
    assert server.ranges == [None, None, None]


def test_a_broken_download_is_resumed_some_times(server: Server) -> None:
    server.answers = ["break", "break", 503]
    assert fetch(url=server.url).read_bytes() == BODY
    starts = [int(asked.removeprefix("bytes=")[:-1]) for asked in server.ranges[1:] if asked]
    assert len(server.ranges) == 4 and len(starts) == 3
    assert 0 < starts[0] < starts[1] == starts[2] < len(BODY)
    server.answers, server.ranges = ["break", *[500] * (download.ATTEMPTS - 1)], []
    with pytest.raises(WeightsError, match="500"):
        fetch(url=server.url, force=True)
    assert len(server.ranges) == download.ATTEMPTS
    assert fetch(url=server.url, force=False).read_bytes() == BODY, "the earlier file is kept"


def test_a_server_that_cannot_resume_sends_all_of_it(server: Server) -> None:
    server.answers = ["break", "no-range"]
    assert fetch(url=server.url).read_bytes() == BODY
    assert server.ranges[1] is not None


def test_no_file_no_server_and_no_address(server: Server) -> None:
    server.answers = [404]
    with pytest.raises(WeightsError, match="404"):
        fetch(url=server.url)
    assert len(server.ranges) == 1, "asking again would not help"
    server.server_close()
    with pytest.raises(WeightsError, match=server.url):
        fetch(url=server.url)
    with pytest.raises(WeightsError, match="--url"):
        fetch(url="not an address")


def test_a_wrong_hash_leaves_nothing(server: Server) -> None:
    part_file().parent.mkdir()
    part_file().write_bytes(BODY + b"more")  # longer than the file
    with pytest.raises(WeightsError, match=sha256(BODY)):
        fetch(url=server.url)
    assert cached_names() == set()
    server.body = BODY[::-1]
    with pytest.raises(WeightsError, match=f"expected {sha256(BODY)}.*received {sha256(BODY[::-1])}"):
        fetch(url=server.url)
    assert cached_names() == set()


def test_concurrent_fetches_download_once(server: Server) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(url=server.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [weights.cache_dir() / FILE] * 4
    assert results[0].read_bytes() == BODY
    assert server.ranges == [None]


def test_a_local_file_is_verified_and_copied(tmp_path: Path) -> None:
    source = tmp_path / "download.pth"
    source.write_bytes(BODY)
    assert fetch(source=source).read_bytes() == BODY
    assert fetch(source=weights.cache_dir() / FILE).read_bytes() == BODY  # onto itself

    source.write_bytes(b"another file")
    with pytest.raises(WeightsError, match=r"download.pth"):
        fetch(source=source)
    assert source.exists() and cached_names() == {FILE}
    assert (weights.cache_dir() / FILE).read_bytes() == BODY
    with pytest.raises(WeightsError, match=r"missing.pth"):
        fetch(source=tmp_path / "missing.pth")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"tiny.*sam_vit_b, sam_vit_l.*lite_medsam"):
        weights.fetch("tiny")


def test_a_file_without_a_published_hash_is_tried_out_and_its_hash_recorded(tmp_path: Path) -> None:
    source = tmp_path / "sam-med2d_b.pth"
    source.write_bytes(BODY)
    tried: list[str] = []

    def refuse(path: Path, backbone: str) -> None:
        raise WeightsError(f"{path} does not fit {backbone}")

    with pytest.raises(WeightsError, match="does not fit vit_b"):
        weights.fetch("sam_med2d", source=source, try_out=refuse)
    assert not (weights.cache_dir() / source.name).exists()
    path = weights.fetch("sam_med2d", source=source, try_out=lambda path, backbone: tried.append(backbone))
    assert tried == ["vit_b"] and sha256(BODY) in (path.parent / "sam-med2d_b.pth.sha256").read_text()
    assert weights.verify(path, "medsam_vit_b") == sha256(BODY)
    path.write_bytes(b"changed")
    with pytest.raises(WeightsError, match=sha256(b"changed")):
        weights.verify(path, "vit_b")


def test_a_package_that_holds_the_file_spares_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights.fetch("lite_medsam", url="http://127.0.0.1:9/")
    assert path.name == "lite_medsam.pth" and path == weights.find("lite_medsam")
    assert weights.verify(path, "lite_medsam") == CHECKPOINTS["lite_medsam"].sha256
    with pytest.raises(WeightsError, match=r"sam_vit_b.*lite_medsam"):
        weights.verify(path, "vit_b")
    monkeypatch.setitem(CHECKPOINTS, "lite_medsam", replace(CHECKPOINTS["lite_medsam"], package="no-such-package"))
    with pytest.raises(WeightsError, match=r"masksam weights lite_medsam; or install no-such-package"):
        weights.find("lite_medsam")


@pytest.mark.parametrize(
    ("name", "dataset", "said"),
    [
        ("lite_medsam", "Dataset027_ACDC", "teacher medsam_vit_b was trained on ACDC"),
        ("lite_medsam", "Dataset218_AMOS2022_task1", "lite_medsam was trained on AMOS"),
        ("lite_medsam", "Dataset010_Colon", "lite_medsam was trained on MSD Colon"),
        ("medsam_vit_b", "Dataset004_Hippocampus", "MSD Hippocampus"),
        ("medsam_vit_b", "Dataset114_MNMs", "M&Ms"),
        ("sam_med2d", "Dataset101_CHAOST2", "does not name"),
        ("lite_medsam", "Dataset101_CHAOST2", None),
        ("medsam_vit_b", "Dataset031_HeartSplits", None),
        ("sam_hq_vit_h", "Dataset027_ACDC", None),
    ],
)
def test_a_dataset_that_a_checkpoint_may_have_seen_is_named(name: str, dataset: str, said: str | None) -> None:
    warning = seen_before(CHECKPOINTS[name], dataset)
    assert warning is None if said is None else warning is not None and said in warning and dataset in warning


def test_a_checkpoint_has_the_intensities_of_the_backbone_that_starts_from_it() -> None:
    for backbone in BACKBONES.values():
        if backbone.checkpoint:
            assert CHECKPOINTS[backbone.checkpoint].intensities == backbone.intensities, backbone.name


def test_a_file_without_a_published_hash_is_known_by_the_recorded_one() -> None:
    file, tuned = weights.cache_dir() / "sam-med2d_b.pth", sha256(b"tuned")
    assert weights.identified(tuned) is None and weights.identified(None) is None
    file.parent.mkdir()
    file.with_name("sam-med2d_b.pth.sha256").write_text(f"{tuned}  sam-med2d_b.pth\n")
    assert weights.identified(tuned) is CHECKPOINTS["sam_med2d"]
    assert weights.identified(CHECKPOINTS["lite_medsam"].sha256) is CHECKPOINTS["lite_medsam"]


# --- find and verify --------------------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert weights.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("MASKSAM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_dir() == tmp_path / "xdg" / "masksam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / ".cache" / "masksam"


def test_find_takes_the_named_file_before_the_cached_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=FILE):
        weights.find("vit_b")

    cached = weights.cache_dir() / FILE
    cached.parent.mkdir()
    cached.touch()
    assert weights.find("vit_b") == cached

    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(folder))
    assert weights.find("vit_b") == cached
    with pytest.raises(WeightsError, match=r"sam_vit_l_0b3195.pth"):
        weights.find("vit_l")
    (folder / FILE).touch()
    assert weights.find("vit_b") == folder / FILE

    (folder / FILE).rename(folder / "sam_hq_vit_b.pth")
    assert weights.find("vit_b") == cached, "SAM-HQ's file is another one, which only its own name chooses"
    assert weights.located(CHECKPOINTS["sam_hq_vit_b"]) and not weights.located(CHECKPOINTS["mobile_sam"])
    (folder / FILE).touch()
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(folder / FILE))
    assert weights.find("vit_l") == folder / FILE
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(folder / "nothing"))
    with pytest.raises(WeightsError, match=str(folder / "nothing")):
        weights.find("vit_b")


def test_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, tuned = tmp_path / "tuned.pth", sha256(b"tuned")
    path.write_bytes(BODY)
    for name in ("vit_b", "sam_hq_vit_b"):  # one architecture
        assert weights.verify(path, name) == sha256(BODY)
    for name in ("vit_l", "medsam_vit_b"):  # another, and other intensities
        with pytest.raises(WeightsError, match="vit_b"):
            weights.verify(path, name)
    path.write_bytes(b"tuned")
    with pytest.raises(WeightsError, match=f"{sha256(BODY)}.*{tuned}"):
        weights.verify(path, "vit_b")
    for named, fine in ((tuned.upper(), True), ("skip", True), ("0" * 64, False), ("yes", False)):
        monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", named)
        if fine:
            assert weights.verify(path, "vit_b") == tuned
        else:
            with pytest.raises(WeightsError, match=named):
                weights.verify(path, "vit_b")
    monkeypatch.delenv("MASKSAM_WEIGHTS_SHA256")
    with pytest.raises(WeightsError, match=r"missing.pth"):
        weights.verify(tmp_path / "missing.pth", "vit_b")
