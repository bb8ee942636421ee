"""As nnSAM: the frozen encoder's features at the skips of nnU-Net's own U-Net, in 3D too. No query, no prompt."""

from ..method import Method, Recipe
from ..modeling.planned_unet import UNetHead

METHODS = (
    Method(
        name="nnsam",
        trainer="NnSAMTrainer",
        source="after Li et al., nnSAM, arXiv 2309.16967, which joins MobileSAM's embedding to one skip in 2D",
        recipe=Recipe(1e-2, optimizer="SGD", weight_decay=3e-5),
        decoder=UNetHead,
        sam=("image_encoder.",),
        unet=True,
    ),
)
