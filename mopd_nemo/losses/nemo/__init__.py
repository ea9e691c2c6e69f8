"""The losses as NeMo-RL v0.7.0 calls them: objects that satisfy its `LossFunction` protocol.

They import without NeMo-RL and can be pickled to its workers. Names in `data` are NeMo-RL's. Losses of micro-batches
add up, so each divides by the global counts that it is given; metrics add up likewise.
"""

from mopd_nemo.losses.nemo.logits import DivergenceLoss
from mopd_nemo.losses.nemo.logprobs import LogprobLoss, TopKDivergenceLoss
from mopd_nemo.losses.nemo.preference import PreferenceLoss

__all__ = ["DivergenceLoss", "LogprobLoss", "PreferenceLoss", "TopKDivergenceLoss"]
