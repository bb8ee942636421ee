"""From each challenge's official download to nnU-Net's raw format."""
