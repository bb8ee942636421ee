"""SAM's mask decoder with adapters along the slices and one more token, which names the class."""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from .adapters import DConvAdapter, DMLPAdapter
from .attention import decoder_attention
from .mask_embedding import dense_embedding
from .patchwise import grow, norm
from .recompute import recomputed
from .token_attention import image_to_token, token_to_image
from .trainable import Trainable

TOKENS_PER_CHUNK = 2**15  # of the image, over all masks decoded at once: 8 masks of a 64x64 grid


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


class TwoWayAdapters(nn.Module):
    """The adapters of one of SAM's two-way blocks, which ``forward`` runs with them."""

    def __init__(self, width: int, depth: int, ratio: float) -> None:
        super().__init__()
        self.self_attention = DMLPAdapter(width, depth, ratio)
        self.token_to_image = DMLPAdapter(width, depth, ratio)
        self.mlp = DMLPAdapter(width, depth, ratio)
        self.image_to_token = DConvAdapter(width, ratio)

    def forward(
        self,
        layer: TwoWayAttentionBlock,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """One adapted block; queries (M, D, T, P), keys (M, D, g_h g_w, P), positions of keys (D, g_h g_w, P)."""
        if layer.skip_first_layer_pe:
            out = _attend(layer.self_attn, queries, queries, queries)
            queries = out + self.self_attention(out)
        else:
            q = queries + query_pe
            out = _attend(layer.self_attn, q, q, queries)
            queries = queries + out + self.self_attention(out)
        queries = layer.norm1(queries)

        out = token_to_image(layer.cross_attn_token_to_image, queries + query_pe, keys, key_pe)
        queries = layer.norm2(queries + out + self.token_to_image(out))

        queries = layer.norm3(queries + layer.mlp(queries) + 0.5 * self.mlp(queries))

        out = image_to_token(layer.cross_attn_image_to_token, keys, key_pe, queries + query_pe, queries)
        along_grid = self.image_to_token(out.unflatten(2, grid)).flatten(2, 3)
        return queries, layer.norm4(keys + out + along_grid)


class AdaptedMaskDecoder(nn.Module):
    """One mask and one class for each query and slice.

    Queries do not see each other: they are a batch axis, as different prompts are in SAM. With ``recompute`` they are
    decoded a few at a time, and again in the backward pass; outside training always a few at a time.
    """

    def __init__(
        self, sam: MaskDecoder, depth: int, num_classes: int, adapter_ratio: float = 0.25, recompute: bool = False
    ) -> None:
        super().__init__()
        width = sam.transformer_dim
        self.sam = sam
        self.recompute = recompute
        self.class_token = ClassToken(width)
        self.adapters = nn.ModuleList(TwoWayAdapters(width, depth, adapter_ratio) for _ in sam.transformer.layers)
        self.final_adapter = DMLPAdapter(width, depth, adapter_ratio)
        self.classifier = Classifier(width, num_classes)

    def unused(self) -> list[nn.Module]:
        """Parts of SAM whose output is never read."""
        return [self.sam.iou_prediction_head, *self.sam.output_hypernetworks_mlps[1:]]

    def forward(
        self,
        image: Tensor,
        pe: Tensor,
        sparse: Tensor,
        features: Tensor,
        downscaling: nn.Sequential,
        class_tokens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Decode all queries.

        Args:
            image: the neck's output (B, D, P, g_h, g_w).
            pe: dense positional encoding (D, P, g_h, g_w).
            sparse: box tokens (B, N, D, 2, P).
            features: of mask prompts, (B, N, D, g_h, g_w, 16).
            downscaling: SAM's, whose last layer makes dense embeddings of these features.
            class_tokens: (B, N, D, P).

        Returns:
            Mask logits (B, N, D, 4 g_h, 4 g_w) and class logits (B, N, D, K + 1).
        """
        if self.training and not self.recompute:
            return self._decode(image, pe, downscaling, sparse, features, class_tokens)
        size = max(1, TOKENS_PER_CHUNK // (image.numel() // image.shape[2]))
        chunks = [
            recomputed(self.training, self._decode, image, pe, downscaling, *chunk)
            for chunk in zip(*(x.split(size, dim=1) for x in (sparse, features, class_tokens)), strict=True)
        ]
        masks, logits = zip(*chunks, strict=True)
        return torch.cat(masks, dim=1), torch.cat(logits, dim=1)

    def _decode(
        self,
        image: Tensor,
        pe: Tensor,
        downscaling: nn.Sequential,
        sparse: Tensor,
        features: Tensor,
        class_tokens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        b, n, d = sparse.shape[:3]
        grid = h, w = image.shape[-2:]
        output_tokens = torch.cat([self.sam.iou_token.weight, self.sam.mask_tokens.weight])  # (1 + 4, P)
        class_tokens = class_tokens + self.class_token.weight
        tokens = torch.cat(
            [output_tokens.to(sparse.dtype).expand(b, n, d, -1, -1), sparse, class_tokens[..., None, :]], dim=-2
        ).flatten(0, 1)  # (B N, D, T, P), T = 5 + 2 + 1
        pixels = image.flatten(-2).transpose(-1, -2)[:, None]  # (B, 1, D, g_h g_w, P)
        keys = (pixels + dense_embedding(downscaling, features.flatten(3, 4))).flatten(0, 1)  # (B N, D, g_h g_w, P)
        key_pe = pe.flatten(-2).transpose(-1, -2)  # (D, g_h g_w, P)

        queries = tokens
        transformer = self.sam.transformer
        for layer, adapters in zip(transformer.layers, self.adapters, strict=True):
            queries, keys = adapters(layer, queries, keys, tokens, key_pe, grid)
        out = token_to_image(transformer.final_attn_token_to_image, queries + tokens, keys, key_pe)
        queries = transformer.norm_final_attn(queries + out + self.final_adapter(out))

        masks = self._masks(keys, queries[:, :, 1])  # (B N, D, g_h g_w, 2, 2, 2, 2)
        masks = masks.unflatten(2, grid).permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(b, n, d, 4 * h, 4 * w)
        return masks, self.classifier(queries[:, :, -1]).unflatten(0, (b, n))

    def _masks(self, keys: Tensor, token: Tensor) -> Tensor:
        """SAM's upscaling and its product with the single-mask token (M, D, P): rows, columns, rows, columns last."""
        first, norm_1, act_1, second, act_2 = self.sam.output_upscaling
        fine = act_1(norm(norm_1, grow(first, keys)))  # (M, D, n, 2, 2, P/4)
        fine = act_2(grow(second, fine))  # (M, D, n, 2, 2, 2, 2, P/8)
        hyper = self.sam.output_hypernetworks_mlps[0](token)  # (M, D, P/8)
        return (fine.flatten(2, -2) @ hyper[..., None]).reshape(fine.shape[:-1])


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = decoder_attention(attention, *(x.flatten(0, 1) for x in (q, k, v)))
    return out.unflatten(0, q.shape[:2])
