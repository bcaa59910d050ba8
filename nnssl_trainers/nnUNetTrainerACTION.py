from nnssl.methods.action import ACTION
from nnssl.trainer import SemiTrainer


class nnUNetTrainerACTION(SemiTrainer):
    """ACTION: contrastive distillation, then anatomical contrast of hard voxels (You et al., IPMI 2023)."""

    method_class = ACTION
