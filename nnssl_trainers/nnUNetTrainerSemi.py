from nnssl.methods.semi import Semi
from nnssl.trainer import SemiTrainer


class nnUNetTrainerSemi(SemiTrainer):
    """The trainer to start with: an averaged teacher, weighted labels, nnU-Net's whole loss (ours)."""

    method_class = Semi
