"""What MaskSAM offers beyond stock prediction: the demo, its phantoms, scores beside nnU-Net, and the report."""
