"""Lean checkpoints: without SAM's frozen weights, which come back bit by bit, or are refused in words."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import tiny_config
from small_sam import install_small_sam, write_small_sam
from torch import Tensor, nn

from masksam_nnunet import sam_weights as weights
from masksam_nnunet.errors import WeightsError
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.sam_network import LEAN


@pytest.fixture(autouse=True)
def sam_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install_small_sam(tmp_path / "cache", monkeypatch)


def fresh(**changes: Any) -> MaskSAM:
    """A network of random weights; every seed gives another one."""
    network = MaskSAM(tiny_config(**{"backbone": "vit_b", **changes}), 1, 3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def trained() -> MaskSAM:
    """As after a training: SAM from its file, all else something of its own."""
    network = fresh()
    network.load_sam(weights.find("vit_b"))
    return network


def lean_state(network: MaskSAM) -> dict[str, Tensor]:
    with network.lean_state_dicts():
        return {name: value.clone() for name, value in network.state_dict().items()}


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_lean_state_dict_leaves_out_what_is_frozen_and_nothing_else() -> None:
    network = trained()
    full, lean = copy_of(network), lean_state(network)
    left_out = full.keys() - lean.keys()
    assert left_out == network.sam_tensors().keys() and lean.keys() - full.keys() == {LEAN}
    assert {name for name, p in network.named_parameters() if not p.requires_grad} <= left_out
    assert LEAN in lean and LEAN not in full
    assert_same(full, copy_of(network))


def test_a_tensor_of_sam_that_is_trained_stays() -> None:
    network = trained()
    name = "image_encoder.blocks.1.norm1.weight"
    network.get_parameter(name).requires_grad_(True).data.add_(1.0)
    lean = lean_state(network)
    assert name in lean
    other = fresh()
    other.load_state_dict(lean)
    assert_same(copy_of(network), copy_of(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_comes_back_is_identical_interpolated_positions_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(write_small_sam(tmp_path / "tuned.pth", dtype)))
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
    network = trained()
    torch.save(lean_state(network), tmp_path / "lean.pth")
    torch.save(network.state_dict(), tmp_path / "full.pth")
    assert (tmp_path / "lean.pth").stat().st_size < (tmp_path / "full.pth").stat().st_size
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "0" * 64)  # has no say: the checkpoint names its file
    other = fresh()
    assert other.image_encoder.pos_embed.shape[1:3] == (2, 3), "the file's is 4 by 4"
    other.load_state_dict(torch.load(tmp_path / "lean.pth"))
    assert other.sam_is_loaded and other.sam_sha256() == network.sam_sha256() is not None
    assert_same(copy_of(network), copy_of(other))
    x = torch.randn(1, 1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(network(x), other(x))


def test_a_network_that_holds_the_right_sam_reads_no_file(sam_file: Path) -> None:
    folds = [trained(), trained()]
    network = fresh()
    network.load_state_dict(lean_state(folds[0]))
    sam_file.unlink()
    for other in (network, deepcopy(network)):
        other.load_state_dict(lean_state(folds[1]))
        assert_same(copy_of(folds[1]), copy_of(other))
    other = fresh()
    other.load_state_dict(network.state_dict())  # a full one brings the hash
    assert other.sam_sha256() == network.sam_sha256()


def test_networks_without_memory_are_completed_by_assignment() -> None:
    source = trained()
    with torch.device("meta"):
        target = MaskSAM(source.config, 1, 3)
    target.load_state_dict(lean_state(source), assign=True)
    assert_same(copy_of(source), copy_of(target))


def test_random_weights_are_never_left_out() -> None:
    network = fresh()
    assert network.sam_sha256() is None
    assert_same(lean_state(network), copy_of(network))
    tiny = MaskSAM(tiny_config(), 1, 3)
    assert_same(lean_state(tiny), copy_of(tiny))


def refused(network: MaskSAM, state: dict[str, Tensor]) -> str:
    """The error of loading ``state``, which changes nothing."""
    before = copy_of(network)
    with pytest.raises(WeightsError) as error:
        network.load_state_dict(state)
    assert_same(before, copy_of(network))
    assert not network.sam_is_loaded
    return str(error.value)


def test_another_or_no_file_is_named(sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained()
    wanted = str(source.sam_sha256())
    other = write_small_sam(tmp_path / "other.pth")
    monkeypatch.setenv("MASKSAM_WEIGHTS", str(other))
    monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
    found = weights.verify(other, "vit_b")
    for trusted in ("skip", found):
        monkeypatch.setenv("MASKSAM_WEIGHTS_SHA256", trusted)
        message = refused(fresh(), lean_state(source))
        assert all(said in message for said in (wanted, str(other), found)), message
    tuned = trained()
    monkeypatch.delenv("MASKSAM_WEIGHTS")
    assert "masksam weights" not in refused(fresh(), lean_state(tuned)), "a fine-tuned file cannot be fetched"
    sam_file.unlink()
    message = refused(fresh(), lean_state(source))
    assert all(said in message for said in (wanted, str(sam_file), "masksam weights sam_vit_b")), message


def test_loading_stays_strict(sam_file: Path) -> None:
    source = trained()
    lean, full = lean_state(source), copy_of(source)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        fresh().load_state_dict(lean | {"more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "stem'):
        fresh().load_state_dict({name: value for name, value in lean.items() if not name.startswith("stem.")})
    sam_file.unlink()
    name = "image_encoder.pos_embed"
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        fresh().load_state_dict({key: value for key, value in full.items() if key != name})
