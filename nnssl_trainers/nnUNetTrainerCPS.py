from nnssl.methods.cps import CPS
from nnssl.trainer import SemiTrainer


class nnUNetTrainerCPS(SemiTrainer):
    """CPS: two networks teach each other with hard pseudo-labels (Chen et al., CVPR 2021)."""

    method_class = CPS
