"""How large checkpoints are, full and lean, with the optimizer's state, for each SAM.

    python benchmarks/performance/checkpoint_sizes.py [--out benchmarks/performance/checkpoint_sizes.json]

Bytes of tensors, from networks without memory (4×256×256, u = 4, N = 8, C = 1, K = 4, the defaults otherwise) and
AdamW's two moments for what is trained. For ViT-B files are written too: what they have beyond the tensors is names.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM

PATCH, UPSAMPLE, QUERIES, CHANNELS, CLASSES = (4, 256, 256), 4, 8, 1, 4
MEASURED = "vit_b"


def build(backbone: str, device: str) -> MaskSAM:
    """As after a training that read SAM's file."""
    with torch.device(device):
        network = MaskSAM(MaskSAMConfig(backbone, PATCH, UPSAMPLE, QUERIES), CHANNELS, CLASSES)
    network.set_sam_sha256("01" * 32)
    return network


def checkpoint(network: MaskSAM, lean: bool) -> dict[str, Any]:
    """What of nnU-Net's checkpoints has a size worth naming."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": empty(p), "exp_avg_sq": empty(p)}
    if lean:
        with network.lean_state_dicts():
            weights = network.state_dict()
    else:
        weights = network.state_dict()
    return {"network_weights": weights, "optimizer_state": optimizer.state_dict()}


def empty(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p, requires_grad=False)


def tensor_bytes(content: object) -> int:
    """Of every storage in nested dicts, once."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)

    visit(content)
    return sum(storages.values())


def file_bytes(content: object) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "checkpoint.pth")
        torch.save(content, file)
        return file.stat().st_size


def row(backbone: str) -> dict[str, Any]:
    network = build(backbone, "meta")
    result: dict[str, Any] = {
        "backbone": backbone,
        "parameters": sum(p.numel() for p in network.parameters()),
        "trained": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }
    result |= {f"{kind}_bytes": tensor_bytes(checkpoint(network, kind == "lean")) for kind in ("full", "lean")}
    if backbone == MEASURED:
        network = build(backbone, "cpu")
        result |= {f"{kind}_file_bytes": file_bytes(checkpoint(network, kind == "lean")) for kind in ("full", "lean")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rows = [row(backbone) for backbone in ("vit_b", "vit_l", "vit_h")]
    for r in rows:
        full, lean = r["full_bytes"], r["lean_bytes"]
        print(
            f"{r['backbone']}: {r['parameters']:,} parameters, {r['trained']:,} trained; a fold {full / 1e6:,.0f} MB "
            f"full, {lean / 1e6:,.0f} MB lean ({lean / full:.0%}); five folds {5 * full / 1e9:.2f} and "
            f"{5 * lean / 1e9:.2f} GB"
        )
        for kind in ("full", "lean"):
            if size := r.get(f"{kind}_file_bytes"):
                print(
                    f"  its {kind} file has {size:,} bytes, {size / r[f'{kind}_bytes'] - 1:.2%} more than its tensors"
                )
    plan = {"patch": PATCH, "upsample": UPSAMPLE, "queries": QUERIES, "channels": CHANNELS, "classes": CLASSES}
    content = {"torch": torch.__version__, "plan": plan, "optimizer": "AdamW", "checkpoints": rows}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
