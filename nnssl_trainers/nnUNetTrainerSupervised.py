from nnssl.methods.supervised import Supervised
from nnssl.trainer import SemiTrainer


class nnUNetTrainerSupervised(SemiTrainer):
    """Supervised: nnU-Net on the labeled cases alone, same schedule keys, the lower bound (Isensee et al.,
    Nat Methods 2021)."""

    method_class = Supervised
