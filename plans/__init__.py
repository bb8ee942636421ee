"""What nnU-Net's plans say, and do not say, about a MaskSAM network."""
