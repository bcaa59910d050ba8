from nnssl.methods.caml import CAML
from nnssl.trainer import SemiTrainer


class nnUNetTrainerCAML(SemiTrainer):
    """CAML: two networks agree on predictions and on correlations with a bank (Gao et al., MICCAI 2023)."""

    method_class = CAML
