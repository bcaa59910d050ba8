from nnssl.methods.diffcl import DiffCL
from nnssl.trainer import SemiTrainer


class nnUNetTrainerDiffCL(SemiTrainer):
    """Diff-CL: diffusion and conv network teach each other, high-frequency Mamba, contrast (arXiv
    2503.09408)."""

    method_class = DiffCL
