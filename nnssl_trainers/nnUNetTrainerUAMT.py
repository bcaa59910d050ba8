from nnssl.methods.uamt import UAMT
from nnssl.trainer import SemiTrainer


class nnUNetTrainerUAMT(SemiTrainer):
    """UA-MT: Mean Teacher where the teacher's Monte-Carlo entropy is low (Yu et al., MICCAI 2019)."""

    method_class = UAMT
