from nnssl.methods.action import ACTION
from nnssl.trainer import SemiTrainer


class nnUNetTrainerACTION(SemiTrainer):
    """ACTION: contrastive distillation of encoder and decoder, then anatomical contrast (You et al., IPMI
    2023)."""

    method_class = ACTION
