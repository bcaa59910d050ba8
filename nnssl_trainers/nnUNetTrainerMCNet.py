from nnssl.methods.mcnet import MCNet
from nnssl.trainer import SemiTrainer


class nnUNetTrainerMCNet(SemiTrainer):
    """MC-Net: two decoders on one encoder sharpen each other (Wu et al., MICCAI 2021)."""

    method_class = MCNet
