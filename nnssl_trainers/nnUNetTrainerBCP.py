from nnssl.methods.bcp import BCP
from nnssl.trainer import SemiTrainer


class nnUNetTrainerBCP(SemiTrainer):
    """BCP: copy-paste between labeled and unlabeled patches, both ways (Bai et al., CVPR 2023)."""

    method_class = BCP
