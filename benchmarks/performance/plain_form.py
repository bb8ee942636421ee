"""The mathematics of the paper's form, written plainly: references for benchmarks and tests.

Attention holds its matrix, image embeddings are repeated for every query, targets and losses go slice by slice, label
by label (DETR, arXiv 2005.12872; Mask2Former, arXiv 2112.01527). Weights are the network's own, so that results and
gradients can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from segment_anything.modeling import PromptEncoder
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor

from masksam_nnunet.config import Grid, MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput
from masksam_nnunet.modeling.geometry import generalised_iou, to_patch
from masksam_nnunet.modeling.image_encoder import AdaptedBlock, AdaptedImageEncoder
from masksam_nnunet.modeling.mask_decoder import AdaptedMaskDecoder, AdaptedTwoWayBlock
from masksam_nnunet.modeling.mask_head import MaskHead
from masksam_nnunet.modeling.prompt_encoder import AdaptedPromptEncoder
from masksam_nnunet.modeling.prompt_generator import Prompts


def plain_parts(network: MaskSAM, x: Tensor) -> MaskSAMOutput:
    """As ``network.outputs(x)``; x is (B, C, D, H, W)."""
    images, stem = network.stem(x)
    levels, neck = plain_encoder(network.image_encoder, images)
    prompts = network.prompt_generator(x, levels, neck)
    sparse, dense = plain_prompt_encoder(network.prompt_encoder, prompts)
    pe = network.prompt_encoder.dense_pe()
    masks, classes = plain_decoder(network.mask_decoder, neck, pe, sparse, dense, prompts.class_tokens)
    masks = _mask_head(network.mask_head, masks, prompts.features, stem)
    return MaskSAMOutput(*(t.transpose(1, 2) for t in (classes, masks, prompts.mask_logits, prompts.boxes)))


def _mask_head(head: MaskHead, masks: Tensor, generator: Tensor, stem: Tensor) -> Tensor:
    """One convolution of what is concatenated at patch resolution."""
    masks = to_patch(masks, head.grid)
    joined = torch.cat([(masks / 2).tanh(), to_patch(generator, head.grid), stem], dim=1)
    parts = (head.seg_layers["from_masks"], *head.from_features)
    weight = torch.cat([part.weight for part in parts], dim=1)
    bias = torch.stack([part.bias for part in parts]).sum(0)
    return masks + head.seg_layers["residual"](head.convs(F.conv3d(joined, weight, bias)))


def plain_encoder(encoder: AdaptedImageEncoder, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """As ``encoder(images)``."""
    b, d = images.shape[:2]
    x = encoder.patch_embed(images.flatten(0, 1)) + encoder.pos_embed  # (B D, g_h, g_w, E)
    x = x.unflatten(0, (b, d)) + encoder.depth_embedding()[:, None, None]
    levels = []
    for index, block in enumerate(encoder.blocks):
        x = _block(block, x)
        if index in encoder.global_blocks:
            levels.append(x)
    neck = encoder.neck(x.flatten(0, 1).permute(0, 3, 1, 2))
    return levels, neck.unflatten(0, (b, d))


def _block(block: AdaptedBlock, x: Tensor) -> Tensor:
    b, d, h, w, _ = x.shape
    y = block.norm1(x).flatten(0, 1)  # (B D, g_h, g_w, E)
    if block.window_size > 0:
        y, padded = window_partition(y, block.window_size)
        y = window_unpartition(block.attn(y), block.window_size, padded, (h, w))
    else:
        y = block.attn(y)
    y = y.unflatten(0, (b, d))
    x = x + y + block.attention_adapter(y)
    y = block.norm2(x)
    return x + block.mlp(y) + 0.5 * block.mlp_adapter(y)


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
    layer: AdaptedTwoWayBlock, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, grid: tuple[int, int]
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


class PlainCriterion:
    """The mask classification loss for label maps without an ignore label, masks compared at every voxel."""

    def __init__(self, config: MaskSAMConfig, num_classes: int) -> None:
        self.loss = config.loss
        self.grid = Grid.of(config)
        self.num_classes = num_classes

    def __call__(self, output: MaskSAMOutput, segmentation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms; ``segmentation`` is (B, 1, D, H, W)."""
        weights = self.loss
        aux_masks = to_patch(output.aux_mask_logits, self.grid)
        names = ("class", "mask_bce", "mask_dice", "aux_bce", "aux_dice", "box_l1", "box_giou")
        sums = {name: output.class_logits.new_zeros(()) for name in names}
        number, weight = 0, 0.0
        # Indexing a whole batch slice by slice would make a gradient as large as the batch for every slice.
        volumes = zip(
            output.class_logits, output.mask_logits, aux_masks, output.aux_boxes, segmentation[:, 0], strict=True
        )
        for volume in volumes:
            for logits, masks, aux, found, segmented in zip(*volume, strict=True):
                labels, truth, boxes = self._targets(segmented)
                queries, targets = self._match(logits, masks, aux, found, labels, truth, boxes)
                number += len(labels)

                wanted = torch.full((len(logits),), self.num_classes, device=logits.device)
                wanted[queries] = labels[targets]
                classes = torch.ones(self.num_classes + 1, device=logits.device)
                classes[-1] = weights.no_object
                sums["class"] = sums["class"] + F.cross_entropy(logits, wanted, classes, reduction="sum")
                weight += classes[wanted].sum().item()
                for prefix, predicted in (("mask", masks), ("aux", aux)):
                    bce, dice = _pairs(predicted[queries].flatten(1), truth[targets].flatten(1))
                    sums[f"{prefix}_bce"] = sums[f"{prefix}_bce"] + bce
                    sums[f"{prefix}_dice"] = sums[f"{prefix}_dice"] + dice
                sums["box_l1"] = sums["box_l1"] + (found[queries] - boxes[targets]).abs().sum()
                sums["box_giou"] = sums["box_giou"] + (1 - generalised_iou(found[queries], boxes[targets])).sum()
        terms = {name: total / (weight if name == "class" else number) for name, total in sums.items()}
        factor = {"class": weights.class_weight} | {name: getattr(weights, name) for name in terms if name != "class"}
        return torch.stack([factor[name] * term for name, term in terms.items()]).sum(), terms

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes (T,), masks (T, H, W) and boxes (T, 4) of one slice."""
        rows, columns = self.grid.padded
        classes, masks, boxes = [], [], []
        for label in labels.unique().tolist():
            mask = labels == label
            y, x = mask.nonzero(as_tuple=True)
            classes.append(int(label))
            masks.append(mask.float())
            (x0, x1), (y0, y1) = x.aminmax(), y.aminmax()
            boxes.append([int(x0) / columns, int(y0) / rows, (int(x1) + 1) / columns, (int(y1) + 1) / rows])
        device = labels.device
        return torch.tensor(classes, device=device), torch.stack(masks), torch.tensor(boxes, device=device)

    @torch.no_grad()
    def _match(
        self, logits: Tensor, masks: Tensor, aux: Tensor, found: Tensor, labels: Tensor, truth: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = self.loss
        cost = -weights.class_weight * logits.softmax(-1)[:, labels]  # (N, T)
        truth = truth.flatten(1)  # (T, H W)
        for predicted, bce, dice in (
            (masks, weights.mask_bce, weights.mask_dice),
            (aux, weights.aux_bce, weights.aux_dice),
        ):
            flat = predicted.flatten(1)  # (N, H W)
            positive = F.binary_cross_entropy_with_logits(flat, torch.ones_like(flat), reduction="none")
            negative = F.binary_cross_entropy_with_logits(flat, torch.zeros_like(flat), reduction="none")
            cost = cost + bce * (positive @ truth.T + negative @ (1 - truth).T) / flat.shape[1]
            scores = flat.sigmoid()
            total = scores.sum(-1)[:, None] + truth.sum(-1)[None]
            cost = cost + dice * (1 - (2 * scores @ truth.T + 1) / (total + 1))
        cost = cost + weights.box_l1 * torch.cdist(found, boxes, p=1)
        cost = cost + weights.box_giou * (1 - generalised_iou(found[:, None], boxes[None]))
        queries, targets = linear_sum_assignment(cost.cpu())
        return torch.as_tensor(queries, device=cost.device), torch.as_tensor(targets, device=cost.device)


def _pairs(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum()
    scores = logits.sigmoid()
    dice = 1 - (2 * (scores * truth).sum(-1) + 1) / (scores.sum(-1) + truth.sum(-1) + 1)
    return bce, dice.sum()
