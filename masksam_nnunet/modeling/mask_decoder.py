"""SAM's mask decoder with adapters along the slices and one more token, which names the class."""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import MaskSAMConfig
from .adapters import DConvAdapter, DMLPAdapter
from .attention import decoder_attention, image_to_token, token_to_image
from .blocks import Trainable, zero_
from .compute import grow, norm

SURE = 6.0
"""The logit at which a query is of its class at first."""


class ClassToken(Trainable):
    """A learned classifier token, added to the one of each query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight)


class Classifier(Trainable):
    """Class logits from the decoded classifier token, "no object" last.

    Its layer is named as nnU-Net's segmentation layers, so that ``-pretrained_weights`` may change K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList([nn.Linear(width, num_classes + 1)])

    def forward(self, token: Tensor) -> Tensor:
        return self.seg_layers[0](token)


class PresenceClassifier(Trainable):
    """As :class:`Classifier`, for queries that belong to classes: each is of its own class, or "no object".

    All start sure of their class; "no object" is learned as a correction.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.Linear(width, 1)
        zero_(layer)
        self.seg_layers = nn.ModuleList([layer])

    def forward(self, token: Tensor) -> Tensor:
        return SURE + self.seg_layers[0](token)


class AdaptedTwoWayBlock(TwoWayAttentionBlock):
    """One of SAM's two-way blocks with four adapters."""

    def __init__(self, backbone: Backbone, is_first: bool, depth: int, ratio: float) -> None:
        width = backbone.prompt_width
        super().__init__(width, backbone.decoder_heads, backbone.decoder_mlp, skip_first_layer_pe=is_first)
        self.self_adapter = DMLPAdapter(width, depth, ratio)
        self.token_adapter = DMLPAdapter(width, depth, ratio)
        self.mlp_adapter = DMLPAdapter(width, depth, ratio)
        self.image_adapter = DConvAdapter(width, ratio)

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """One adapted block.

        Args:
            queries, query_pe: tokens and their positions (M, D, T, P).
            keys: the image (M, D, g_h g_w, P).
            key_pe: positions of the image (D, g_h g_w, P).
            grid: (g_h, g_w).
        """
        q = queries if self.skip_first_layer_pe else queries + query_pe
        out = _attend(self.self_attn, q, q, queries)
        out = out + self.self_adapter(out)
        queries = self.norm1(out if self.skip_first_layer_pe else queries + out)

        out = token_to_image(self.cross_attn_token_to_image, queries + query_pe, keys, key_pe)
        queries = self.norm2(queries + out + self.token_adapter(out))

        queries = self.norm3(queries + self.mlp(queries) + 0.5 * self.mlp_adapter(queries))

        out = image_to_token(self.cross_attn_image_to_token, keys, key_pe, queries + query_pe, queries)
        along_grid = self.image_adapter(out.unflatten(2, grid)).flatten(2, 3)
        return queries, self.norm4(keys + out + along_grid)


class AdaptedTransformer(TwoWayTransformer):
    """SAM's two-way transformer with adapters in its blocks and after its last attention."""

    def __init__(self, backbone: Backbone, depth: int, ratio: float) -> None:
        width = backbone.prompt_width
        super().__init__(0, width, backbone.decoder_heads, backbone.decoder_mlp)
        self.layers = nn.ModuleList(AdaptedTwoWayBlock(backbone, index == 0, depth, ratio) for index in range(2))
        self.final_adapter = DMLPAdapter(width, depth, ratio)

    def forward(self, tokens: Tensor, keys: Tensor, key_pe: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens (M, D, T, P) and the image (M, D, g_h g_w, P) after they have attended to each other."""
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe, grid)
        out = token_to_image(self.final_attn_token_to_image, queries + tokens, keys, key_pe)
        return self.norm_final_attn(queries + out + self.final_adapter(out)), keys


class AdaptedMaskDecoder(MaskDecoder):
    """One mask and one class for each query and slice. Its own parameters have SAM's names.

    Queries do not see each other: they are a batch axis, as different prompts are in SAM.
    """

    def __init__(self, config: MaskSAMConfig, depth: int, num_classes: int) -> None:
        backbone, adapter_ratio = config.encoder, config.adapter_ratio
        width = backbone.prompt_width
        super().__init__(
            transformer_dim=width,
            transformer=AdaptedTransformer(backbone, depth, adapter_ratio),
            iou_head_hidden_dim=width,
        )
        self.class_token = ClassToken(width)
        self.classifier = PresenceClassifier(width) if config.anchored else Classifier(width, num_classes)

    def unused(self) -> list[nn.Module]:
        """Parts of SAM whose output is never read."""
        return [self.iou_prediction_head, *self.output_hypernetworks_mlps[1:]]

    def forward(
        self, image: Tensor, pe: Tensor, sparse: Tensor, dense: Tensor, class_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the queries.

        Args:
            image: the neck's output (B, D, P, g_h, g_w).
            pe: dense positional encoding (D, P, g_h, g_w).
            sparse: embedded boxes (B, N, D, 2, P).
            dense: embedded masks (B, N, D, g_h, g_w, P).
            class_tokens: (B, N, D, P).

        Returns:
            Mask logits (B, N, D, 4 g_h, 4 g_w) and class logits (B, N, D, K + 1), or (B, N, D, 1) of a query's own
            class against "no object".
        """
        b, n, d = sparse.shape[:3]
        grid = h, w = image.shape[-2:]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + 4, P)
        class_tokens = class_tokens + self.class_token.weight
        tokens = torch.cat(
            [output_tokens.to(sparse.dtype).expand(b, n, d, -1, -1), sparse, class_tokens[..., None, :]], dim=-2
        ).flatten(0, 1)  # (B N, D, T, P), T = 5 + 2 + 1
        pixels = image.flatten(-2).transpose(-1, -2)[:, None]  # (B, 1, D, g_h g_w, P)
        keys = (pixels + dense.flatten(3, 4)).flatten(0, 1)  # (B N, D, g_h g_w, P)
        key_pe = pe.flatten(-2).transpose(-1, -2)  # (D, g_h g_w, P)
        queries, keys = self.transformer(tokens, keys, key_pe, grid)

        masks = self._masks(keys, queries[:, :, 1])  # (B N, D, g_h g_w, 2, 2, 2, 2)
        masks = masks.unflatten(2, grid).permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(b, n, d, 4 * h, 4 * w)
        return masks, self.classifier(queries[:, :, -1]).unflatten(0, (b, n))

    def _masks(self, keys: Tensor, token: Tensor) -> Tensor:
        """SAM's upscaling and its product with the single-mask token (M, D, P): rows, columns, rows, columns last."""
        first, norm_1, act_1, second, act_2 = self.output_upscaling
        fine = act_1(norm(norm_1, grow(first, keys)))  # (M, D, n, 2, 2, P/4)
        fine = act_2(grow(second, fine))  # (M, D, n, 2, 2, 2, 2, P/8)
        hyper = self.output_hypernetworks_mlps[0](token)  # (M, D, P/8)
        return (fine.flatten(2, -2) @ hyper[..., None]).reshape(fine.shape[:-1])


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = decoder_attention(attention, *(x.flatten(0, 1) for x in (q, k, v)))
    return out.unflatten(0, q.shape[:2])
