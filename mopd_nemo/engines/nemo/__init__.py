"""The NeMo-RL side: the only room that may import nemo_rl, megatron or ray."""
