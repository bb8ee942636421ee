"""Archives of portable models from elsewhere: nothing but a model's files comes out, or nothing at all."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from masksam_nnunet.errors import PortableError
from masksam_nnunet.inference.export import archive
from masksam_nnunet.inference.export.archive import Limits, pack, unpack

CONTENT = {"model.json": b"{}", "plans.json": b"[1]", "fold_0.safetensors": bytes(range(256)) * 9}


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


def refused(file: Path, limits: Limits = archive.LIMITS) -> str:
    """The error of unpacking, which leaves no file anywhere."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(PortableError) as error:
        unpack(file, file.parent / "target", limits)
    assert sorted(file.parent.rglob("*")) == before
    assert str(file) in str(error.value)
    return str(error.value)


def test_what_was_packed_comes_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    pack(folder, tmp_path / "model.zip")
    unpack(tmp_path / "model.zip", tmp_path / "target")
    assert {file.name: file.read_bytes() for file in (tmp_path / "target").iterdir()} == CONTENT


def test_one_folder_around_it_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip", (member("my model/", stat.S_IFDIR | 0o755), b""), prefix="my model/")
    unpack(file, tmp_path / "target")
    assert {file.name: file.read_bytes() for file in (tmp_path / "target").iterdir()} == CONTENT


NAMES = [
    "../fold_1.safetensors", "/fold_1.safetensors", "a/../fold_1.safetensors", "../../fold_1.safetensors",
    "C:/fold_1.safetensors", "a\\..\\fold_1.safetensors", "..", ".", "fold_1.safetensors.", "fold_01.safetensors",
    "fold_-1.safetensors", "fold_1000.safetensors", "fold_.safetensors", "fold_1.pth", "data.pkl", "MODEL.JSON",
    "model.json ", "fold_1.safetensors\0.txt", "a/b/", "/", "//fold_1.safetensors", "./fold_1.safetensors", "~/x",
    "fold_١.safetensors", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    message = refused(write(folder / "a.zip", (member(name), b"x")))
    assert "which is no file of a model" in message or "lie in several folders" in message
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.zip", "b"]


def test_nnunets_own_zip_is_told_of(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "nnunet.zip", "w") as archive:
        for name in ("dataset.json", "plans.json", "fold_0/checkpoint_final.pth"):
            archive.writestr(f"Dataset004_A/nnUNetTrainer__nnUNetPlans__2d/{name}", b"x")
    message = refused(tmp_path / "nnunet.zip")
    assert "dataset.json', which is no file of a model" in message
    assert "are pickles: if you trust where it comes from, install it with nnUNetv2_install_pretrained_model" in message


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR])
def test_links_and_devices_are_refused(kind: int, tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip", (member("fold_1.safetensors", kind | 0o777), b"/etc/passwd"))
    assert "is a link or a device" in refused(file)


def test_names_twice_and_too_many(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        file = write(tmp_path / "a.zip", (member("plans.json"), b"2"))
    assert "holds 'plans.json' twice" in refused(file)
    file = write(tmp_path / "b.zip", (member("x/plans.json"), b"2"))
    assert "holds 'plans.json' twice" in refused(file)
    file = write(tmp_path / "c.zip", *((member(f"fold_{n}.safetensors"), b"") for n in range(1, 200)))
    assert "more than 104 files" in refused(file)


def test_an_endless_list_of_contents_is_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip", *((member(f"fold_{n}.safetensors"), b"") for n in range(1, 50_000)))
    assert "its list of contents is larger than any model's" in refused(file)


def test_bombs(tmp_path: Path) -> None:
    deflated = zipfile.ZIP_DEFLATED
    file = write(tmp_path / "a.zip", (member("fold_1.safetensors", method=deflated), bytes(2**24)))
    assert "or does not shrink that much" in refused(file)
    assert "has more than 100 bytes" in refused(file, Limits(file_bytes=100))
    assert "has more than 95 bytes" in refused(file, Limits(total_bytes=100)), "5 bytes of JSON came before"
    file = write(tmp_path / "b.zip", (member("dataset.json"), b" " * (2**26 + 1)))
    assert f"has more than {2**26} bytes" in refused(file)
    # A header that claims to be small, and one whose packed size would excuse any other.
    lying = bytearray(
        write(tmp_path / "c.zip", (member("fold_1.safetensors", method=deflated), bytes(2**24))).read_bytes()
    )
    place = lying.rindex(b"PK\1\2")
    for packed, unpacked in ((None, 10), (2**31, 2**24), (2**31, 10)):
        changed = bytearray(lying)
        if packed:
            changed[place + 20 : place + 24] = struct.pack("<L", packed)
        changed[place + 24 : place + 28] = struct.pack("<L", unpacked)
        (tmp_path / "c.zip").write_bytes(changed)
        message = refused(tmp_path / "c.zip", Limits(file_bytes=2**20))
        assert "cannot be unpacked" in message or "when unpacked" in message


def damaged(change: Callable[[bytearray], object]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        result = bytearray(content)
        change(result)
        return bytes(result)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"no zip",
        lambda content: content[:-30],
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"PK\3\4", b"PK\3\5", 1),
        damaged(lambda content: content.__setitem__(content.index(bytes(range(100))), 1)),
    ],
)
def test_damaged_archives(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip")
    file.write_bytes(change(file.read_bytes()))
    assert "cannot be unpacked" in refused(file)


def test_encrypted_and_exotic(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = write(tmp_path / "a.zip", (member("fold_1.safetensors", method=method), b"x"))
        assert "is encrypted, or not stored or deflated" in refused(file)
    content = bytearray(write(tmp_path / "b.zip").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    assert "is encrypted" in refused(tmp_path / "b.zip")


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip")
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")):
        make(tmp_path / "target")
        with pytest.raises(PortableError, match="is there already"):
            unpack(file, tmp_path / "target")
        assert (tmp_path / "target").is_symlink() or not list((tmp_path / "target").iterdir())
        (tmp_path / "target").unlink() if (tmp_path / "target").is_symlink() else (tmp_path / "target").rmdir()
    with pytest.raises(PortableError, match="No such file or directory"):
        unpack(file, tmp_path / "no" / "target")
    with pytest.raises(PortableError, match="is no file"):
        unpack(tmp_path, tmp_path / "target")
