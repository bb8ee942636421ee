"""SAM checkpoints: fetched over a loopback server that misbehaves, verified, read, fitted, loaded."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Server, serving
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import get_rel_pos
from small_sam import expect_release
from torch import Tensor, nn

from masksam_nnunet import download
from masksam_nnunet import sam_weights as weights
from masksam_nnunet.errors import WeightsError
from masksam_nnunet.sam_state import identify_backbone, read_checkpoint, remap_sam_state_dict

BODY = bytes(range(256)) * 2048  # 512 KiB: several chunks
FILE = weights.SAM_RELEASES["vit_b"].file_name


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine, a cache of the test's own, no pauses between attempts."""
    for name in ("MASKSAM_WEIGHTS", "MASKSAM_WEIGHTS_SHA256", "MASKSAM_WEIGHTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_pause_seconds", lambda failures: 0.0)
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


fetch = partial(weights.fetch, "vit_b", progress=False)


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_fetch_puts_the_verified_file_in_the_cache_and_does_not_fetch_it_twice(server: Server) -> None:
    path = fetch(url=server.url)
    assert path == weights.cache_dir() / FILE
    assert path.read_bytes() == BODY
    assert cached_names() == {FILE}
    assert fetch(url=server.url) == path
    assert server.ranges == [None]


def test_force_fetches_from_the_beginning(server: Server) -> None:
    fetch(url=server.url)
    part_file().write_bytes(b"old")
    fetch(url=server.url, force=True)
    assert server.ranges == [None, None]


def test_a_damaged_cached_file_is_fetched_again(server: Server) -> None:
    fetch(url=server.url).write_bytes(BODY[:100])
    assert fetch(url=server.url).read_bytes() == BODY


def test_a_broken_download_is_resumed_within_one_call(server: Server) -> None:
    server.answers = ["break", "break", 503]
    assert fetch(url=server.url).read_bytes() == BODY
    starts = [int(asked.removeprefix("bytes=")[:-1]) for asked in server.ranges[1:] if asked]
    assert len(server.ranges) == 4 and len(starts) == 3
    assert 0 < starts[0] < starts[1] == starts[2] < len(BODY)


def test_an_earlier_part_is_resumed(server: Server) -> None:
    part_file().parent.mkdir()
    part_file().write_bytes(BODY[:1000])
    assert fetch(url=server.url).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]
    assert cached_names() == {FILE}


def test_a_complete_part_needs_no_bytes(server: Server) -> None:
    part_file().parent.mkdir()
    part_file().write_bytes(BODY)
    assert fetch(url=server.url).read_bytes() == BODY
    assert server.ranges == [f"bytes={len(BODY)}-"]


def test_a_part_longer_than_the_file_is_dropped(server: Server) -> None:
    part_file().parent.mkdir()
    part_file().write_bytes(BODY + b"more")
    assert fetch(url=server.url).read_bytes() == BODY
    assert server.ranges == [f"bytes={len(BODY) + 4}-", None]


def test_a_server_that_ignores_ranges_is_read_from_the_start(server: Server) -> None:
    server.answers = ["break", "no-range"]
    assert fetch(url=server.url).read_bytes() == BODY
    assert len(server.ranges) == 2


def test_giving_up_keeps_the_part_and_the_next_call_resumes(server: Server) -> None:
    server.answers = ["break", *[500] * download.ATTEMPTS]
    with pytest.raises(WeightsError, match=r"500.*kept.*--from"):
        fetch(url=server.url)
    assert len(server.ranges) == 1 + download.ATTEMPTS
    assert cached_names() == {part_file().name}
    assert fetch(url=server.url).read_bytes() == BODY


def test_a_server_that_always_breaks_at_one_place_is_given_up(server: Server) -> None:
    server.answers = ["break no-range"] * 50
    with pytest.raises(WeightsError, match="cannot download"):
        fetch(url=server.url)
    assert len(server.ranges) == 1 + download.ATTEMPTS


def test_a_refusal_is_final(server: Server) -> None:
    server.answers = [404]
    with pytest.raises(WeightsError, match="404"):
        fetch(url=server.url)
    assert len(server.ranges) == 1


def test_no_server_and_no_address(server: Server) -> None:
    server.server_close()
    with pytest.raises(WeightsError, match=r"cannot download http://127\.0\.0\.1"):
        fetch(url=server.url)
    with pytest.raises(WeightsError, match="--url"):
        fetch(url="not an address")


def test_a_wrong_hash_leaves_nothing(server: Server) -> None:
    server.body = BODY[::-1]
    with pytest.raises(WeightsError, match=f"expected {sha256(BODY)}.*received {sha256(BODY[::-1])}"):
        fetch(url=server.url)
    assert cached_names() == set()


def test_an_interruption_keeps_the_part(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    server.answers = ["break"]
    monkeypatch.setattr(download.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(url=server.url)
    assert 0 < part_file().stat().st_size < len(BODY)
    assert fetch(url=server.url).read_bytes() == BODY
    assert server.ranges[-1] is not None


def test_the_mirror_variable_may_name_a_folder(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_WEIGHTS_URL", server.url.removesuffix(FILE))
    assert fetch().read_bytes() == BODY


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


def test_a_full_disk_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".part":
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(WeightsError, match=r"No space left.*MASKSAM_CACHE"):
        fetch(url=server.url)


def test_a_cache_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsError, match="cannot write"):
        fetch(url="http://127.0.0.1:9/")


def test_a_local_file_is_verified_and_copied(tmp_path: Path) -> None:
    source = tmp_path / "download.pth"
    source.write_bytes(BODY)
    assert fetch(source=source).read_bytes() == BODY
    assert fetch(source=weights.cache_dir() / FILE).read_bytes() == BODY  # onto itself

    source.write_bytes(b"another file")
    with pytest.raises(WeightsError, match="wrong SHA-256"):
        fetch(source=source)
    assert source.exists() and cached_names() == {FILE}
    assert (weights.cache_dir() / FILE).read_bytes() == BODY
    with pytest.raises(WeightsError, match="--from"):
        fetch(source=tmp_path / "missing.pth")


def test_an_unknown_backbone_is_answered_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="'tiny'; there are vit_b, vit_l, vit_h"):
        weights.fetch("tiny")


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
    with pytest.raises(WeightsError) as missing:
        weights.find("vit_b")
    for said in (str(weights.cache_dir() / FILE), "masksam weights vit_b", "MASKSAM_WEIGHTS", "MASKSAM_RANDOM_INIT=1"):
        assert said in str(missing.value)

    cached = weights.cache_dir() / FILE
    cached.parent.mkdir()
    cached.touch()
    assert weights.find("vit_b") == cached

    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(folder))
    assert weights.find("vit_b") == cached
    with pytest.raises(WeightsError, match=re.escape(str(folder / "sam_vit_l_0b3195.pth"))):
        weights.find("vit_l")
    (folder / FILE).touch()
    assert weights.find("vit_b") == folder / FILE

    monkeypatch.setenv("MASKSAM_WEIGHTS", str(folder / FILE))
    assert weights.find("vit_l") == folder / FILE
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(folder / "nothing"))
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        weights.find("vit_b")


def test_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tuned.pth"
    path.write_bytes(BODY)
    assert weights.verify(path, "vit_b") == sha256(BODY)

    with pytest.raises(WeightsError, match="which is SAM's vit_b"):
        weights.verify(path, "vit_l")
    path.write_bytes(b"tuned")
    with pytest.raises(WeightsError, match=f"expected {sha256(BODY)}.*received {sha256(b'tuned')}.*masksam weights"):
        weights.verify(path, "vit_b")
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", sha256(b"tuned").upper())
    assert weights.verify(path, "vit_b") == sha256(b"tuned")
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
    assert weights.verify(path, "vit_b") == sha256(b"tuned")
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match="MASKSAM_WEIGHTS_SHA256"):
        weights.verify(path, "vit_b")
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "yes")
    with pytest.raises(WeightsError, match="64 hexadecimal digits"):
        weights.verify(path, "vit_b")
    with pytest.raises(WeightsError, match="cannot read"):
        monkeypatch.delenv("MASKSAM_WEIGHTS_SHA256")
        weights.verify(tmp_path / "missing.pth", "vit_b")


# --- read -------------------------------------------------------------------------------------------------------------


def tiny_parts(grid: tuple[int, int] = (4, 4), width: int = 16) -> dict[str, nn.Module]:
    """segment-anything's own modules, tiny, with position parameters that are not zero."""
    encoder = ImageEncoderViT(
        img_size=16, embed_dim=width, depth=2, num_heads=2, out_chans=8, use_rel_pos=True, global_attn_indexes=(1,),
        window_size=2,
    )  # fmt: skip
    rows, columns = grid
    encoder.pos_embed = nn.Parameter(torch.zeros(1, rows, columns, width))
    encoder.blocks[1].attn.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, width // 2))
    encoder.blocks[1].attn.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, width // 2))
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter)
    transformer = TwoWayTransformer(depth=1, embedding_dim=8, num_heads=2, mlp_dim=8)
    return {
        "image_encoder": encoder,
        "prompt_encoder": PromptEncoder(8, grid, (16 * rows, 16 * columns), mask_in_chans=4),
        "mask_decoder": MaskDecoder(transformer_dim=8, transformer=transformer, iou_head_hidden_dim=8),
    }


def flat_state(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


class Code:
    """Unpickles by running a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("nested", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_gives_the_tensors_wherever_they_stand(tmp_path: Path, nested: str | None, zipped: bool) -> None:
    state = flat_state(tiny_parts())
    content = {nested: state, "epoch": 3} if nested else state
    torch.save(content, tmp_path / "sam.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "sam.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle-0", "pickle-4"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path, form: str) -> None:
    trace, path = tmp_path / "executed", tmp_path / "sam.pth"
    content = {**flat_state(tiny_parts()), "image_encoder.extra": Code(trace)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(Code(trace), protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match=r"refused.*system.*nothing of it was executed"):
        read_checkpoint(path)
    assert not trace.exists()
    # The pickle does run code where it is loaded without care: the test could fail.
    if form == "pickle-4":
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named_so(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "sam.pth"
    torch.save(flat_state(tiny_parts()), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match="truncated"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list"),
        ({"image_encoder.a": 3}, "not tensors: image_encoder.a"),
        ({"conv.weight": torch.zeros(1)}, "no key starts with image_encoder. or prompt_encoder. or mask_decoder."),
        ({"image_encoder.a": torch.zeros(1), "mask_decoder.a": torch.zeros(1)}, "no key starts with prompt_encoder."),
    ],
)
def test_what_is_not_sams_is_refused(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=re.escape(said)):
        read_checkpoint(tmp_path / "other.pth")


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>sign in</html>")
    with pytest.raises(WeightsError, match="not a checkpoint in SAM's format"):
        read_checkpoint(tmp_path / "page.pth")
    with pytest.raises(WeightsError, match="cannot read"):
        read_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="cannot read"):
        read_checkpoint(tmp_path)


# --- fit --------------------------------------------------------------------------------------------------------------


def encoder_of(width: int, blocks: int) -> dict[str, Tensor]:
    state = {f"image_encoder.blocks.{index}.norm1.bias": torch.zeros(1) for index in range(blocks)}
    return state | {"image_encoder.patch_embed.proj.weight": torch.zeros(width, 1)}


@pytest.mark.parametrize(("width", "blocks", "name"), [(768, 12, "vit_b"), (1024, 24, "vit_l"), (1280, 32, "vit_h")])
def test_backbones_are_told_apart(width: int, blocks: int, name: str) -> None:
    assert identify_backbone(encoder_of(width, blocks)) == name
    assert identify_backbone(shapes(encoder_of(width, blocks))) == name
    assert identify_backbone(encoder_of(width, blocks - 1)) is None
    assert identify_backbone({}) is None


def test_another_backbone_is_named() -> None:
    with pytest.raises(WeightsError, match="the file holds vit_l, the network is vit_b"):
        remap_sam_state_dict(encoder_of(1024, 24), shapes(encoder_of(768, 12)))
    with pytest.raises(WeightsError, match="an encoder of width 16 with 2 blocks, the network is vit_h"):
        remap_sam_state_dict(encoder_of(16, 2), shapes(encoder_of(1280, 32)))


@pytest.mark.parametrize("grid", [(4, 4), (7, 3), (2, 9), (1, 1), (2, 3), (64, 40)])
def test_every_grid_is_reached(grid: tuple[int, int]) -> None:
    source, target = flat_state(tiny_parts()), flat_state(tiny_parts(grid))
    result, report = remap_sam_state_dict(source, shapes(target))
    assert shapes(result) == shapes(target)
    assert {entry.name for entry in report.interpolated} == {
        key for key in target if target[key].shape != source[key].shape
    }
    assert set(report.loaded) == {key for key in target if target[key].shape == source[key].shape}
    assert all(torch.equal(result[key], source[key]) for key in report.loaded)
    assert all(torch.isfinite(value).all() and value.is_contiguous() for value in result.values())


@pytest.mark.parametrize("size", [1, 3, 9, 20])
def test_relative_positions_agree_with_segment_anything(size: int) -> None:
    """segment-anything interpolates on the fly: given ours, it does not, and yields the same."""
    source, target = flat_state(tiny_parts((6, 6))), shapes(flat_state(tiny_parts((size, 5))))
    key = "image_encoder.blocks.1.attn.rel_pos_h"
    ours = remap_sam_state_dict(source, target)[0][key]
    assert len(ours) == 2 * size - 1
    assert torch.equal(get_rel_pos(size, size, ours), get_rel_pos(size, size, source[key]))


def test_position_embedding_keeps_what_interpolation_must_keep() -> None:
    def resize(value: Tensor, grid: tuple[int, int]) -> Tensor:
        state = flat_state(tiny_parts((value.shape[1], value.shape[2]))) | {"image_encoder.pos_embed": value}
        return remap_sam_state_dict(state, shapes(flat_state(tiny_parts(grid))))[0]["image_encoder.pos_embed"]

    constant = torch.randn(16).expand(1, 8, 8, 16)
    for grid in [(3, 3), (5, 20), (16, 16)]:
        assert torch.allclose(resize(constant, grid), constant[:, :1, :1].expand(1, *grid, 16), atol=1e-5)
    # A ramp stays a ramp, at pixel centres (align_corners=False), along the axis it is on.
    ramp = (torch.arange(16.0) + 0.5)[None, :, None, None].expand(1, 16, 16, 16)
    inner = resize(ramp, (8, 4))[0, 2:-2, :, 0]
    assert torch.allclose(inner, ((torch.arange(8.0) + 0.5) * 2)[2:-2, None].expand(-1, 4), atol=0.05)
    # Shrinking averages: a pattern finer than the new grid vanishes instead of aliasing.
    stripes = (torch.arange(16) % 2 * 2.0 - 1)[None, :, None, None].expand(1, 16, 16, 16)
    assert resize(stripes, (5, 16)).abs()[:, 1:-1].max() < 0.2


def test_half_precision_stays_half_precision() -> None:
    source = {key: value.half() for key, value in flat_state(tiny_parts()).items()}
    result, _ = remap_sam_state_dict(source, shapes(flat_state(tiny_parts((3, 5)))))
    assert {value.dtype for value in result.values()} == {torch.float16}


@pytest.mark.parametrize("part", ["image_encoder", "prompt_encoder", "mask_decoder"])
def test_every_key_counts(part: str) -> None:
    state = flat_state(tiny_parts())
    expected = shapes(state)
    key = next(key for key in reversed(state) if key.startswith(part))
    with pytest.raises(WeightsError, match=f"1 missing: {re.escape(key)}"):
        remap_sam_state_dict({name: value for name, value in state.items() if name != key}, expected)
    with pytest.raises(WeightsError, match=f"1 unexpected: {part}.more"):
        remap_sam_state_dict({**state, f"{part}.more": torch.zeros(1)}, expected)
    with pytest.raises(WeightsError, match=f"1 of another shape: {re.escape(key)} .*the network has"):
        remap_sam_state_dict({**state, key: torch.zeros(2, 2, 2)}, expected)


def test_only_grids_and_lengths_are_interpolated() -> None:
    state = flat_state(tiny_parts())
    expected = shapes(state)
    for key, value in [
        ("image_encoder.pos_embed", torch.zeros(1, 4, 4, 8)),
        ("image_encoder.pos_embed", torch.zeros(2, 4, 4, 16)),
        ("image_encoder.blocks.1.attn.rel_pos_h", torch.zeros(9, 4)),
        ("image_encoder.blocks.1.norm1.weight", torch.zeros(9)),
    ]:
        with pytest.raises(WeightsError, match="1 of another shape"):
            remap_sam_state_dict({**state, key: value}, expected)


# --- load -------------------------------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, backbone: str = "vit_b") -> Path:
    torch.save(state, path)
    expect_release(monkeypatch, backbone, path.read_bytes())
    return path


def test_load_fills_the_parts_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = flat_state(tiny_parts((8, 8)))
    path = save(tmp_path / "sam.pth", state, monkeypatch)
    parts = tiny_parts((6, 3))
    parts["mask_decoder"].add_module("adapter", nn.Linear(2, 2))
    adapter = parts["mask_decoder"].adapter.weight.clone()
    new = ["mask_decoder.adapter.weight", "mask_decoder.adapter.bias", "stem.conv.weight"]

    report = weights.load_sam(parts, "vit_b", path, new)

    loaded = flat_state(parts)
    wanted, _ = remap_sam_state_dict(state, {key: value.shape for key, value in loaded.items() if key not in new})
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert torch.equal(parts["mask_decoder"].adapter.weight, adapter)
    assert report.file == str(path) and report.sha256 == sha256(path.read_bytes())
    assert len(report.loaded) + len(report.interpolated) == len(state)
    text = str(report)
    assert "image_encoder.pos_embed: 1x8x8x16 -> 1x6x3x16" in text
    assert "new, not from SAM: 3 tensors (mask_decoder 2, stem 1)" in text
    assert report.sha256 in text


@pytest.mark.parametrize("fault", ["missing", "unexpected", "hash", "truncated", "another backbone"])
def test_nothing_is_half_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    parts = tiny_parts()
    before = flat_state(parts)
    state = flat_state(tiny_parts(width=32) if fault == "another backbone" else tiny_parts())
    if fault == "missing":
        state.popitem()
    if fault == "unexpected":
        state["mask_decoder.more"] = torch.zeros(1)
    path = save(tmp_path / "sam.pth", state, monkeypatch)
    if fault in ("hash", "truncated"):
        path.write_bytes(path.read_bytes()[:-100])
    if fault == "truncated":
        expect_release(monkeypatch, "vit_b", path.read_bytes())
    with pytest.raises(WeightsError):
        weights.load_sam(parts, "vit_b", path)
    after = flat_state(parts)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_parts_without_memory_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "sam.pth", flat_state(tiny_parts()), monkeypatch)
    parts = {name: module.to("meta") for name, module in tiny_parts().items()}
    with pytest.raises(ValueError, match="meta device"):
        weights.load_sam(parts, "vit_b", path)
