"""MaskSAM: adapters that connect slices, a prompt generator in place of the user, and mask classification."""

from ..method import MASKSAM, Adaptation, Method

METHODS = (
    Method(
        name=MASKSAM,
        trainer="MaskSAMTrainer",
        source="Xie et al., MaskSAM, arXiv 2403.14103",
        recipe=None,
        adaptation=Adaptation(beside=True, depth_embedding=True),
        network="masksam_nnunet.modeling:MaskSAM",
    ),
)
