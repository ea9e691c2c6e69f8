"""Random numbers that are a function of a name, so that no generator has a state to save."""

from __future__ import annotations

import hashlib


def seed_of(name: str) -> int:
    """A seed below 2^56 for a name such as `train/0/17/3`: torch and vLLM both take it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
