from nnssl.methods.semsim import SemSim
from nnssl.trainer import SemiTrainer


class nnUNetTrainerSemSim(SemiTrainer):
    """SemSim: predictions refined by similar voxels, within an image and across images (arXiv 2410.13486)."""

    method_class = SemSim
