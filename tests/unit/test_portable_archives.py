"""Archives of portable models from elsewhere: nothing but a model's files comes out, or an error."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from masksam_nnunet.errors import ModelError, UsageError
from masksam_nnunet.inference.export import install
from masksam_nnunet.inference.export.description import is_file_of_a_model
from masksam_nnunet.inference.export.install import unpack, unpack_model

CONTENT = {"model.json": b"{}", "plans.json": b"[1]", "fold_0.safetensors": bytes(range(256)) * 9}
FOLD = "fold_1.safetensors"


def member(name: str, mode: int = stat.S_IFREG | 0o644, method: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename, info.external_attr, info.compress_type = name, mode << 16, method  # as it is, not made harmless
    return info


def write(file: Path, *more: tuple[zipfile.ZipInfo, bytes], prefix: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in CONTENT.items():
            opened.writestr(prefix + name, content)
        for info, content in more:
            opened.writestr(info, content)
    return file


def refused(file: Path, said: str = "") -> None:
    """Unpacking ends with an error that names the file; nothing but a model's files is written, and only inside."""
    before, target = set(file.parent.rglob("*")), file.parent / "target"
    target.mkdir()
    with pytest.raises(ModelError) as error:
        unpack(file, target)
    assert str(file) in str(error.value) and said in str(error.value)
    for path in set(file.parent.rglob("*")) - before - {target}:
        assert path.parent == target and is_file_of_a_model(path.name)
        path.unlink()
    target.rmdir()


def test_one_folder_around_it_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip", (member("my model/", stat.S_IFDIR | 0o755), b""), prefix="my model/")
    (tmp_path / "target").mkdir()
    unpack(file, tmp_path / "target")
    assert {file.name: file.read_bytes() for file in (tmp_path / "target").iterdir()} == CONTENT


def test_other_names_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    outside = f"../{FOLD}", f"/{FOLD}", f"C:/{FOLD}", f"a\\..\\{FOLD}", f"{FOLD}\0.txt", "a/b/"
    for name in (*outside, "..", "", "fold_01.safetensors", "fold_1.pth", "data.pkl"):
        refused(write(folder / "a.zip", (member(name), b"x")))
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.zip", "b"]


def test_links_devices_and_other_compressions_are_refused(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR):
        refused(write(tmp_path / "a.zip", (member(FOLD, kind | 0o777), b"/etc/passwd")), FOLD)
    refused(write(tmp_path / "a.zip", (member(FOLD, method=zipfile.ZIP_BZIP2), b"x")), FOLD)


def test_names_twice_and_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        file = write(tmp_path / "a.zip", (member("plans.json"), b"2"))
    refused(file, "plans.json")
    refused(write(tmp_path / "b.zip", (member("x/plans.json"), b"2")), "plans.json")
    monkeypatch.setattr(install, "_CHUNK", 200)  # a longer list of contents is not read
    refused(write(tmp_path / "c.zip", *((member(f"fold_{n}.safetensors"), b"") for n in range(1, 90))))


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = member(FOLD, method=zipfile.ZIP_DEFLATED)
    refused(write(tmp_path / "a.zip", (packed, bytes(2**24))), FOLD)
    refused(write(tmp_path / "b.zip", (member("dataset.json"), b" " * (2**26 + 1))), f"{2**26} bytes")
    with monkeypatch.context() as patch:
        patch.setattr(install, "LARGEST_MODEL", 100)
        refused(tmp_path / "a.zip", "95 bytes")  # 5 bytes of JSON come before
    # A header that claims to be small, and one whose packed size would excuse any other.
    monkeypatch.setattr(install, "LARGEST_MODEL", 2**20)
    content = (tmp_path / "a.zip").read_bytes()
    place = content.rindex(b"PK\1\2")
    for claimed, unpacked in ((None, 10), (2**31, 2**24), (2**31, 10)):
        lying = bytearray(content)
        if claimed:
            lying[place + 20 : place + 24] = struct.pack("<L", claimed)
        lying[place + 24 : place + 28] = struct.pack("<L", unpacked)
        (tmp_path / "a.zip").write_bytes(lying)
        refused(tmp_path / "a.zip")


def test_damaged_and_encrypted_archives(tmp_path: Path) -> None:
    content = write(tmp_path / "a.zip").read_bytes()
    flags = content.index(b"PK\1\2") + 8
    for change in (
        b"",
        b"no zip",
        content[: len(content) // 2],
        content.replace(b"PK\3\4", b"PK\3\5", 1),
        content.replace(bytes(range(100)), bytes(100), 1),
        content[:flags] + b"\1" + content[flags + 1 :],  # says that it is encrypted
    ):
        (tmp_path / "a.zip").write_bytes(change)
        refused(tmp_path / "a.zip")


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for target in ("folder", "link"):
        with pytest.raises(UsageError, match=target):
            unpack_model(file, tmp_path / target)
    assert not list((tmp_path / "folder").iterdir()) and not (tmp_path / "nowhere").exists()
