"""Methods by name, one small file each."""

from __future__ import annotations

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.methods.base import Method
from mopd_nemo.methods.gkd import Gkd
from mopd_nemo.methods.grpo import Grpo
from mopd_nemo.methods.mopd import Mopd
from mopd_nemo.methods.opd import Opd
from mopd_nemo.methods.preference import Dpo, Simpo
from mopd_nemo.methods.sdpo import Sdpo
from mopd_nemo.methods.verified_sft import VerifiedSft

__all__ = ["Method", "make_method"]

_METHODS: dict[str, type[Method]] = {
    "mopd": Mopd,
    "sdpo": Sdpo,
    "opd": Opd,
    "gkd": Gkd,
    "grpo": Grpo,
    "dpo": Dpo,
    "simpo": Simpo,
    "verified_sft": VerifiedSft,
}


def make_method(config: Config, chat: Chat) -> Method:
    """The configured method."""
    return _METHODS[config.method](config, chat)
