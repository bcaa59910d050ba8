from nnssl.methods.filtermatch import FilterMatch
from nnssl.trainer import SemiTrainer


class nnUNetTrainerFilterMatch(SemiTrainer):
    """nnFilterMatch: own labels of turned patches, in nnU-Net's whole loss (arXiv 2509.19746)."""

    method_class = FilterMatch
