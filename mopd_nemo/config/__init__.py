"""Every setting of a run. `schema` is the tree, `load` reads YAML into it, `checks` has the rules between sections."""

from mopd_nemo.config.base import ConfigBlock, TeacherError, UserError
from mopd_nemo.config.peers import FeedbackConfig, LeakConfig, PeersConfig, RequireConfig, Templates
from mopd_nemo.config.schema import (
    Config,
    DivergenceConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    TrainConfig,
)
from mopd_nemo.config.teacher import TeacherConfig

__all__ = [
    "Config",
    "ConfigBlock",
    "DivergenceConfig",
    "FeedbackConfig",
    "LeakConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PeersConfig",
    "PolicyGradientConfig",
    "RequireConfig",
    "TeacherConfig",
    "TeacherError",
    "Templates",
    "TrainConfig",
    "UserError",
]
