"""SAM's prompt encoder and mask decoder, adapted, with image embeddings and their positions repeated for each query."""

from __future__ import annotations

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from masksam_nnunet.modeling.mask_decoder import AdaptedMaskDecoder, AdaptedTwoWayBlock
from masksam_nnunet.modeling.prompt_encoder import AdaptedPromptEncoder
from masksam_nnunet.modeling.prompt_generator import Prompts


def plain_prompt_encoder(encoder: AdaptedPromptEncoder, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Sparse embeddings (B, N, D, 2, P) and dense embeddings (B, N, D, P, g_h, g_w)."""
    height, width = encoder.grid.image
    boxes, masks = prompts.boxes * prompts.boxes.new_tensor([width, height, width, height]), prompts.mask_logits
    if encoder.hard:
        boxes, masks = boxes.detach().floor(), (masks.detach() > 0).to(masks.dtype)
    lead = masks.shape[:3]
    with torch.autocast(masks.device.type, enabled=False):
        sparse, _ = PromptEncoder.forward(encoder, points=None, boxes=boxes.float().flatten(0, 2), masks=None)
    _, dense = PromptEncoder.forward(encoder, points=None, boxes=None, masks=masks.flatten(0, 2)[:, None])
    return sparse.unflatten(0, lead), dense.unflatten(0, lead)


def plain_decoder(
    decoder: AdaptedMaskDecoder, image: Tensor, pe: Tensor, sparse: Tensor, dense: Tensor, class_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Mask logits (B, N, D, 4 g_h, 4 g_w) and class logits (B, N, D, K + 1).

    Args:
        image: the neck's output (B, D, P, g_h, g_w).
        pe: dense positional encoding (D, P, g_h, g_w).
        sparse, dense: of :func:`plain_prompt_encoder`.
        class_tokens: (B, N, D, P).
    """
    transformer = decoder.transformer
    b, n, d = sparse.shape[:3]
    h, w = image.shape[-2:]
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).to(sparse.dtype)
    class_tokens = class_tokens + decoder.class_token.weight
    tokens = torch.cat([output_tokens.expand(b, n, d, -1, -1), sparse, class_tokens[..., None, :]], dim=-2)
    tokens = tokens.flatten(0, 1)  # (B N, D, T, P)
    keys = torch.repeat_interleave(image, n, dim=0) + dense.flatten(0, 1)
    keys = keys.flatten(3).transpose(2, 3)  # (B N, D, g_h g_w, P)
    key_pe = torch.repeat_interleave(pe[None], b * n, dim=0).flatten(3).transpose(2, 3)

    queries = tokens
    for layer in transformer.layers:
        queries, keys = _two_way(layer, queries, keys, tokens, key_pe, (h, w))
    out = _attend(transformer.final_attn_token_to_image, queries + tokens, keys + key_pe, keys)
    queries = transformer.norm_final_attn(queries + out + transformer.final_adapter(out))

    upscaled = decoder.output_upscaling(keys.flatten(0, 1).transpose(1, 2).unflatten(2, (h, w)))
    hyper = decoder.output_hypernetworks_mlps[0](queries[:, :, 1]).flatten(0, 1)  # (B N D, P/8)
    masks = (hyper[:, None] @ upscaled.flatten(2))[:, 0].unflatten(1, upscaled.shape[2:])
    return masks.unflatten(0, (b, n, d)), decoder.classifier(queries[:, :, -1]).unflatten(0, (b, n))


def _two_way(
    layer: AdaptedTwoWayBlock,
    queries: Tensor,
    keys: Tensor,
    query_pe: Tensor,
    key_pe: Tensor,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    q = queries if layer.skip_first_layer_pe else queries + query_pe
    out = _attend(layer.self_attn, q, q, queries)
    queries = out + layer.self_adapter(out) + (0 if layer.skip_first_layer_pe else queries)
    queries = layer.norm1(queries)
    out = _attend(layer.cross_attn_token_to_image, queries + query_pe, keys + key_pe, keys)
    queries = layer.norm2(queries + out + layer.token_adapter(out))
    queries = layer.norm3(queries + layer.mlp(queries) + 0.5 * layer.mlp_adapter(queries))
    out = _attend(layer.cross_attn_image_to_token, keys + key_pe, queries + query_pe, queries)
    along_grid = layer.image_adapter(out.unflatten(2, grid)).flatten(2, 3)
    return queries, layer.norm4(keys + out + along_grid)


def _attend(attention: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = attention(*(x.flatten(0, 1) for x in (q, k, v)))  # segment-anything's
    return out.unflatten(0, q.shape[:2])
