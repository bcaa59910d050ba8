"""Semi-supervised training for nnU-Net v2: one trainer flag, one extra folder of unlabeled scans."""

__version__ = "0.1.0"
