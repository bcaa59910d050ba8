from nnssl.methods.mean_teacher import MeanTeacher
from nnssl.trainer import SemiTrainer


class nnUNetTrainerMeanTeacher(SemiTrainer):
    """Mean Teacher: consistency with a moving average of the student (Tarvainen & Valpola, NeurIPS 2017)."""

    method_class = MeanTeacher
