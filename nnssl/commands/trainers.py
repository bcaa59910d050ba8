"""``nnssl trainers``: which trainers there are, and where nnU-Net finds them."""

from nnssl.training.lookup import list_trainers as list_trainers
from nnssl.training.lookup import trainers_folder as trainers_folder
