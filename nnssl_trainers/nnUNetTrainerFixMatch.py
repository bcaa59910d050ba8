from nnssl.methods.fixmatch import FixMatch
from nnssl.trainer import SemiTrainer


class nnUNetTrainerFixMatch(SemiTrainer):
    """FixMatch: hard labels of a weak view teach a strong one (Sohn et al., NeurIPS 2020)."""

    method_class = FixMatch
