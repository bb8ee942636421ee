"""Draws the network with the sizes of the paper's ACDC setting: python docs/figures/network.py

Every shape in it is read from a real network, built without memory and run on fake tensors.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput, count_parameters

CONFIG = MaskSAMConfig(backbone="vit_b", patch_size=(4, 256, 256), resolution=4)
BATCH, CHANNELS, CLASSES = 1, 1, 4
NEW, SAM, PLAIN, INK = "#f6c177", "#bcd7ea", "#eeeeee", "#222222"


def shapes_of(network: MaskSAM) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all tensors that each part returns, by its name; "input" and "output" of the whole."""
    found: dict[str, list[tuple[int, ...]]] = {}

    def tensors(value: object) -> list[tuple[int, ...]]:
        if isinstance(value, Tensor):
            return [tuple(value.shape)]
        return [shape for part in value for shape in tensors(part)] if isinstance(value, tuple | list) else []

    def record(name: str) -> object:
        def hook(module: nn.Module, given: object, returned: object) -> None:
            found[name] = tensors(returned)

        return hook

    for name, part in network.named_children():
        part.register_forward_hook(record(name))
    x = torch.zeros(BATCH, CHANNELS, *CONFIG.patch_size)
    network.train()
    output = network(x)
    assert isinstance(output, MaskSAMOutput)
    found["input"] = [tuple(x.shape)]
    found["parts"] = tensors(output)
    found["output"] = [tuple(network.eval()(x).shape)]
    return found


def words(shape: tuple[int, ...]) -> str:
    """Without the batch: 4×256×256."""
    return "×".join(map(str, shape[1:]))


def thousands(counts: tuple[int, int]) -> str:
    """Of parameters (all, trained)."""
    total, trained = (round(count / 1e3) for count in counts)
    return f"{total} k, {'all' if total == trained else f'{trained} k'} trained"


class Drawing:
    """Boxes and arrows; coordinates in inches from the lower left."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = plt.figure(figsize=(width, height))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, w: float, h: float, title: str, text: str, colour: str) -> None:
        patch = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec=INK, lw=0.9)
        self.axes.add_patch(patch)
        lines = text.count("\n") + 1 if text else 0
        middle = y + h / 2 + 0.085 * lines
        self.axes.text(x + w / 2, middle, title, ha="center", va="center", fontsize=9, weight="bold", color=INK)
        if text:
            self.axes.text(
                x + w / 2, middle - 0.14, text, ha="center", va="top", fontsize=7.4, color=INK, linespacing=1.3
            )

    def tag(self, x: float, y: float, w: float, text: str) -> None:
        patch = FancyBboxPatch((x, y), w, 0.2, boxstyle="round,pad=0,rounding_size=0.06", fc=NEW, ec=INK, lw=0.8)
        self.axes.add_patch(patch)
        self.label(x + w / 2, y + 0.1, text)

    def arrow(self, *points: tuple[float, float]) -> None:
        for start, end in pairwise(points[:-1]):
            self.axes.plot(*zip(start, end, strict=True), color=INK, lw=1.0, solid_capstyle="round")
        head = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], lw=1.0, color=INK, **head))

    def label(self, x: float, y: float, text: str, **options: object) -> None:
        centred = {"ha": "center", "va": "center"}
        self.axes.text(x, y, text, fontsize=7.4, color=INK, linespacing=1.25, **centred | options)


def draw(found: dict[str, list[tuple[int, ...]]], rows: dict[str, tuple[int, int]]) -> Drawing:
    """The figure, from the shapes and each part's numbers of parameters (all, trained)."""

    def millions(part: str) -> str:
        total, trained = (n / 1e6 for n in rows[part])
        share = "all" if total == trained else f"{trained:.1f} M"
        return f"{total:.1f} M, {share} trained" if total >= 0.1 else thousands(rows[part])

    images, stem = found["stem"]
    *levels, neck = found["image_encoder"]
    masks, boxes, tokens, _, maps, *_ = found["prompt_generator"]
    n, k = CONFIG.queries(CLASSES), CLASSES
    # Shapes of some of the queries: the decoder takes a few at a time.
    sparse, dense, low, classes = ((x[0], n, *x[2:]) for x in (*found["prompt_encoder"], *found["mask_decoder"]))
    d = Drawing(13.4, 5.6)

    d.box(0.2, 3.4, 1.3, 1.15, "patch", f"{words(found['input'][0])}\nC×D×H×W", PLAIN)
    d.box(
        2.0,
        3.4,
        1.7,
        1.15,
        "input stem",
        f"3D convolutions, ×{CONFIG.resolution:g},\nadded to the image\n{millions('stem')}",
        NEW,
    )
    d.box(
        4.9,
        3.4,
        2.2,
        1.15,
        "SAM image encoder",
        f"ViT-B over {CONFIG.patch_size[0]} slices, frozen;\ntwo 3D adapters a block\n{millions('image_encoder')}",
        SAM,
    )
    d.box(
        4.9,
        1.15,
        2.2,
        1.15,
        "prompt generator",
        f"3D decoder over five levels\ninstead of the user's clicks\n{millions('prompt_generator')}",
        NEW,
    )
    d.box(8.3, 1.15, 1.8, 1.15, "SAM prompt encoder", f"frozen; {thousands(rows['prompt_encoder'])}", SAM)
    d.box(
        8.3,
        3.4,
        1.8,
        1.15,
        "SAM mask decoder",
        f"frozen; adapters along\nslices; class token\n{millions('mask_decoder')}",
        SAM,
    )
    d.box(
        11.3,
        3.4,
        1.65,
        1.15,
        "mask head",
        f"class maps + gain · masks\n+ residual at patch size\n{millions('mask_head')}",
        NEW,
    )
    d.box(
        11.3, 1.15, 1.65, 1.15, "semantic output", f"log of mask · class\n{words(found['output'][0])}\nK×D×H×W", PLAIN
    )
    d.tag(5.3, 3.3, 1.4, "adapters")
    d.tag(9.1, 3.3, 0.85, "adapters")

    d.arrow((1.5, 3.97), (2.0, 3.97))
    d.arrow((3.7, 3.97), (4.9, 3.97))
    d.label(4.3, 4.04, f"images\n{words(images)}", va="bottom")
    d.arrow((7.1, 3.97), (8.3, 3.97))
    d.label(7.7, 4.04, f"neck\n{words(neck)}", va="bottom")
    d.arrow((6.0, 3.3), (6.0, 2.3))
    d.label(6.08, 2.79, f"{len(levels)} levels of {words(levels[0])}\nand the neck", ha="left")
    d.arrow((7.1, 1.72), (8.3, 1.72))
    d.label(7.7, 1.79, f"masks\n{words(masks)}", va="bottom")
    d.label(7.7, 1.65, f"boxes\n{words(boxes)}", va="top")
    d.arrow((8.7, 2.3), (8.7, 3.4))
    d.label(8.78, 2.79, f"boxes {words(sparse)}\nmasks {words(dense)}", ha="left")
    d.arrow((6.3, 1.15), (6.3, 0.55), (10.45, 0.55), (10.45, 3.6), (10.1, 3.6))
    d.label(8.4, 0.69, f"class tokens {words(tokens)}")
    d.arrow((5.6, 1.15), (5.6, 0.25), (13.15, 0.25), (13.15, 3.97), (12.95, 3.97))
    d.label(8.4, 0.39, f"class maps {words(maps)}, with a loss of their own")
    d.arrow((10.1, 4.2), (11.3, 4.2))
    d.label(10.7, 4.27, f"masks\n{words(low)}", va="bottom")
    d.arrow((2.85, 4.55), (2.85, 5.15), (12.12, 5.15), (12.12, 4.55))
    d.label(7.5, 5.29, f"the stem's features at patch resolution, {words(stem)}")
    d.arrow((12.12, 3.4), (12.12, 2.3))
    d.label(12.2, 2.79, f"masks\n{words((0, n, *CONFIG.patch_size))}", ha="left")
    d.arrow((10.1, 3.85), (10.85, 3.85), (10.85, 1.72), (11.3, 1.72))
    d.label(10.93, 2.79, f"classes\n{words(classes)}", ha="left")

    d.box(0.2, 1.62, 0.32, 0.22, "", "", NEW)
    d.label(0.62, 1.73, "new here, and trained", ha="left")
    d.box(0.2, 1.27, 0.32, 0.22, "", "", SAM)
    d.label(0.62, 1.38, "SAM's, with its weights, frozen", ha="left")
    total, trained = rows["total"]
    d.label(
        0.2, 0.72,
        f"The paper's sizes for ACDC: patch {words((0, *CONFIG.patch_size))}, r = {CONFIG.resolution:g},\n"
        f"K = {k} classes, N = {n} queries, one a class, ViT-B. Shapes\n"
        f"without the batch. Queries: their class or “no object”.\n"
        f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained.",
        ha="left",
    )  # fmt: skip
    return d


def main() -> None:
    """Write network.png beside this file."""
    with FakeTensorMode():
        network = MaskSAM(CONFIG, CHANNELS, CLASSES)
        found = shapes_of(network)
        rows = {name: (total, trained) for name, total, trained in count_parameters(network)}
    drawing = draw(found, rows)
    drawing.figure.savefig(Path(__file__).with_suffix(".png"), dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
