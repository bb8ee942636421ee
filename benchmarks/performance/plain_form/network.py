"""The whole network in its plain form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput
from masksam_nnunet.modeling.geometry import to_patch
from masksam_nnunet.modeling.mask_head import MaskHead

from .decoder import plain_decoder, plain_prompt_encoder
from .encoder import plain_encoder


def plain_parts(network: MaskSAM, x: Tensor) -> MaskSAMOutput:
    """As ``network.parts(x)``; x is (B, C, D, H, W)."""
    images, stem = network.stem(x)
    levels, neck = plain_encoder(network.image_encoder, images)
    prompts = network.prompt_generator(levels, neck)
    sparse, dense = plain_prompt_encoder(network.prompt_encoder, prompts)
    pe = network.prompt_encoder.dense_pe()
    masks, classes = plain_decoder(network.mask_decoder, neck, pe, sparse, dense, prompts.class_tokens)
    masks = _mask_head(network.mask_head, masks, prompts.features, stem)
    return MaskSAMOutput(*(t.transpose(1, 2) for t in (classes, masks, prompts.mask_logits, prompts.boxes)))


def _mask_head(head: MaskHead, masks: Tensor, generator: Tensor, stem: Tensor) -> Tensor:
    """One convolution of what is concatenated at patch resolution."""
    masks = to_patch(masks, head.grid)
    joined = torch.cat([masks, to_patch(generator, head.grid), stem], dim=1)
    parts = (head.from_masks, head.from_generator, head.from_stem)
    weight = torch.cat([part.weight for part in parts], dim=1)
    bias = torch.stack([part.bias for part in parts]).sum(0)
    return masks + head.residual(head.convs(F.conv3d(joined, weight, bias)))
