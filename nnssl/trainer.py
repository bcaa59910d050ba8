"""Where a user's own trainer finds its base class: `from nnssl.trainer import SemiTrainer`."""

from nnssl.training.trainer import SemiTrainer as SemiTrainer
