from nnssl.methods.caml import CAML
from nnssl.trainer import SemiTrainer


class nnUNetTrainerCAML(SemiTrainer):
    """CAML: two networks agree in their predictions and in their correlations with labeled voxels (Gao et
    al., MICCAI 2023)."""

    method_class = CAML
