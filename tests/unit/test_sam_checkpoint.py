"""Checkpoints in SAM's format: read, fitted to another token grid, loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from configs import tiny_config
from segment_anything.modeling.image_encoder import get_rel_pos
from small_sam import SMALL_SAM, expect_release
from torch import Tensor

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.errors import WeightsError
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.network import check_sam_file
from masksam_nnunet.sam_checkpoint import read_checkpoint, remap_sam_state_dict
from masksam_nnunet.sam_weights import find

REL_POS = "image_encoder.blocks.1.attn.rel_pos_h"


@pytest.fixture(autouse=True)
def _small_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)
    monkeypatch.delenv("MASKSAM_WEIGHTS_SHA256", raising=False)


def network(grid: tuple[int, int] = (4, 4)) -> MaskSAM:
    made = MaskSAM(tiny_config(backbone="vit_b", patch_size=(1, 16 * grid[0], 16 * grid[1])), 1, 2)
    with torch.no_grad():
        for value in made.sam_tensors().values():
            value.add_(torch.randn_like(value))
    return made


def sam_state(grid: tuple[int, int] = (4, 4)) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network(grid).sam_tensors().items()}


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nested", "zipped"), [(None, True), ("model", False), ("state_dict", True)])
def test_read_gives_the_tensors_wherever_they_stand(tmp_path: Path, nested: str | None, zipped: bool) -> None:
    state = sam_state()
    content = {nested: state, "epoch": 3} if nested else state
    torch.save(content, tmp_path / "sam.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "sam.pth").tensors
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_what_is_no_checkpoint_of_sam_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save(sam_state(), path)
    whole = path.read_bytes()
    for damaged in (b"<html>sign in</html>", b"", whole[:500], whole[:-200]):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"sam.pth"):
            read_checkpoint(path)
    code = {**sam_state(), "image_encoder.extra": os.getcwd}
    for content in ([1], {"image_encoder.a": 3}, {"conv.weight": torch.zeros(1)}, code):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=r"sam.pth"):
            read_checkpoint(path)
    for missing in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(WeightsError, match=str(missing)):
            read_checkpoint(missing)


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (7, 3), (1, 1), (9, 20)])
def test_every_grid_is_reached(grid: tuple[int, int]) -> None:
    source, target = sam_state(), sam_state(grid)
    result = remap_sam_state_dict(source, shapes(target))
    assert shapes(result) == shapes(target)
    same = {key for key in target if target[key].shape == source[key].shape}
    assert all(torch.equal(result[key], source[key]) for key in same)
    assert all(torch.isfinite(value).all() and value.is_contiguous() for value in result.values())


@pytest.mark.parametrize("size", [1, 3, 9])
def test_relative_positions_agree_with_segment_anything(size: int) -> None:
    """segment-anything interpolates on the fly: given ours, it does not, and yields the same."""
    source = sam_state((6, 6))
    ours = remap_sam_state_dict(source, shapes(sam_state((size, 5))))[REL_POS]
    assert len(ours) == 2 * size - 1
    assert torch.equal(get_rel_pos(size, size, ours), get_rel_pos(size, size, source[REL_POS]))


def test_position_embedding_keeps_what_interpolation_must_keep() -> None:
    key, width = "image_encoder.pos_embed", SMALL_SAM.width

    def resize(value: Tensor, grid: tuple[int, int]) -> Tensor:
        state = sam_state((value.shape[1], value.shape[2])) | {key: value}
        return remap_sam_state_dict(state, shapes(sam_state(grid)))[key]

    # A ramp stays a ramp, at pixel centres (align_corners=False), along the axis it is on.
    ramp = (torch.arange(16.0) + 0.5)[None, :, None, None].expand(1, 16, 16, width)
    inner = resize(ramp, (8, 4))[0, 2:-2, :, 0]
    assert torch.allclose(inner, ((torch.arange(8.0) + 0.5) * 2)[2:-2, None].expand(-1, 4), atol=0.05)
    # Shrinking averages: a pattern finer than the new grid vanishes instead of aliasing.
    stripes = (torch.arange(16) % 2 * 2.0 - 1)[None, :, None, None].expand(1, 16, 16, width)
    assert resize(stripes, (5, 16)).abs()[:, 1:-1].max() < 0.2


def test_every_key_counts_and_only_grids_and_lengths_are_interpolated() -> None:
    state = sam_state()
    expected = shapes(state)
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        key = next(key for key in reversed(state) if key.startswith(part))
        with pytest.raises(WeightsError, match=re.escape(key)):
            remap_sam_state_dict({name: value for name, value in state.items() if name != key}, expected)
        with pytest.raises(WeightsError, match=f"{part}.more"):
            remap_sam_state_dict({**state, f"{part}.more": torch.zeros(1)}, expected)
    for key, shape in [
        ("image_encoder.pos_embed", (1, 4, 4, 8)),
        ("image_encoder.pos_embed", (2, 4, 4, SMALL_SAM.width)),
        (REL_POS, (9, 4)),
        ("image_encoder.blocks.1.norm1.weight", (9,)),
    ]:
        with pytest.raises(WeightsError, match=re.escape(key)):
            remap_sam_state_dict({**state, key: torch.zeros(shape)}, expected)


# --- load -------------------------------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save(state, path)
    expect_release(monkeypatch, "vit_b", path.read_bytes())
    return path


def test_load_fills_sams_part_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {key: value.half() for key, value in sam_state((8, 8)).items()}
    path = save(tmp_path / "sam.pth", state, monkeypatch)
    made = network((6, 3))
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    said = made.load_sam(path)
    loaded = made.sam_tensors()
    wanted = remap_sam_state_dict(state, shapes(loaded))
    assert all(torch.equal(loaded[key], wanted[key].float()) for key in wanted)
    new = [name for name, p in made.named_parameters() if torch.equal(p, before[name])]
    assert all(made.get_parameter(name).requires_grad for name in new) and not set(new) & wanted.keys()
    assert made.sam_is_loaded and made.sam_sha256() is not None
    resized = sum(wanted[key].shape != state[key].shape for key in state)
    counts = {"unchanged": len(state) - resized, "interpolated": resized, "new": len(new)}
    for line, (word, count) in zip(said[1:], counts.items(), strict=True):
        assert word in line and f" {count} tensors" in line


@pytest.mark.parametrize(
    ("rename", "extra", "said"),
    [
        ("module.{}", (), None),  # trained with DistributedDataParallel, as MedSAM
        ("{}", ("mask_decoder.hf_token.weight", "mask_decoder.compress_vit_feat.0.weight"), "2 tensors of SAM-HQ's"),
        ("{}", ("image_encoder.blocks.1.Adapter.channel.0.weight",), "1 tensors of SAM-Med2D's adapters"),
    ],
)
def test_other_formats_are_fitted_and_what_is_left_out_is_reported(
    rename: str, extra: tuple[str, ...], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = sam_state()
    weight = torch.nn.Parameter(torch.zeros(1))
    torch.save(
        {
            "model": {rename.format(key): value for key, value in {**state, **dict.fromkeys(extra, weight)}.items()},
            "optimizer": torch.optim.Adam([weight]),  # SAM-Med2D's file holds it whole
        },
        tmp_path / "sam.pth",
    )
    expect_release(monkeypatch, "vit_b", (tmp_path / "sam.pth").read_bytes())
    made = network((3, 5))
    lines = made.load_sam(tmp_path / "sam.pth")
    assert (said in lines[-1]) if said else "left out" not in lines[-1]
    check_sam_file(tmp_path / "sam.pth", "vit_b")
    with pytest.raises(WeightsError, match="the network is mobile_sam"):
        check_sam_file(tmp_path / "sam.pth", "mobile_sam")
    wanted = remap_sam_state_dict(state, shapes(made.sam_tensors()))
    assert all(torch.equal(value, wanted[key]) for key, value in made.sam_tensors().items())


def test_tiny_vits_are_told_apart_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
    lite, mobile = (MaskSAM(tiny_config(backbone=name), 1, 2) for name in ("lite_medsam", "mobile_sam"))
    path = find("lite_medsam")
    assert "435 tensors" in lite.load_sam(path)[1]
    for made, name in ((mobile, "mobile_sam"), (network(), "vit_b")):
        with pytest.raises(WeightsError, match=f"the file holds lite_medsam, the network is {name}"):
            made.load_sam(path)
    state = torch.load(path, weights_only=True)
    torch.save({"state_dict": {**state, "image_encoder.layers.9.more": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected: image_encoder\.layers\.9\.more"):
        lite.load_sam(tmp_path / "more.pth")


def test_nothing_is_half_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    before = {name: value.detach().clone() for name, value in made.sam_tensors().items()}
    state = sam_state()
    smaller = {key: value for key, value in state.items() if ".blocks.3." not in key}
    path = save(tmp_path / "sam.pth", smaller, monkeypatch)
    with pytest.raises(WeightsError, match="vit_b"):  # another backbone
        made.load_sam(path)
    torch.save(state, path)
    with pytest.raises(WeightsError, match="SHA-256"):
        made.load_sam(path)
    assert all(torch.equal(value, before[name]) for name, value in made.sam_tensors().items())
    assert not made.sam_is_loaded and made.sam_sha256() is None
