"""How large checkpoints are, full and lean, with the optimizer's state, for each SAM.

    python benchmarks/performance/checkpoint_sizes.py

Writes checkpoint_sizes.json: bytes of tensors, from networks without memory (4×256×256, u = 4, N = 8, C = 1, K = 4, the
defaults otherwise) and AdamW's two moments for what is trained. A file has 0.2 % more: the names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from masksam_nnunet.backbones import checkpoint_names
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM

PLAN = {"patch": (4, 256, 256), "upsample": 4, "queries": 8, "channels": 1, "classes": 4}


def row(backbone: str) -> dict[str, Any]:
    """Numbers of parameters, and bytes of a full and of a lean checkpoint."""
    patch, upsample, queries, channels, classes = PLAN.values()
    with torch.device("meta"):
        network = MaskSAM(MaskSAMConfig(backbone, patch, upsample, queries), channels, classes)
    trained = [p for p in network.parameters() if p.requires_grad]
    frozen = [x for x in network.sam_tensors().values() if not x.requires_grad]
    full = _bytes([*network.parameters(), *network.buffers()]) + 2 * _bytes(trained)
    return {
        "backbone": backbone,
        "parameters": sum(p.numel() for p in network.parameters()),
        "trained": sum(p.numel() for p in trained),
        "full_bytes": full,
        "lean_bytes": full - _bytes(frozen),
    }


def _bytes(tensors: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def main() -> None:
    rows = [row(backbone) for backbone in checkpoint_names()]
    for r in rows:
        full, lean = r["full_bytes"] / 1e6, r["lean_bytes"] / 1e6
        print(f"{r['backbone']}: a fold {full:,.0f} MB full, {lean:,.0f} MB lean ({lean / full:.0%})")
    content = {"torch": torch.__version__, "plan": PLAN, "optimizer": "AdamW", "checkpoints": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
