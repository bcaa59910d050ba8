from nnssl.methods.diffcl import DiffCL
from nnssl.trainer import SemiTrainer


class nnUNetTrainerDiffCL(SemiTrainer):
    """Diff-CL: diffusion and convolution teach each other, with high-frequency Mamba (arXiv 2503.09408)."""

    method_class = DiffCL
