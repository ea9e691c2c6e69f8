"""Multi-Rollout On-Policy Distillation (MOPD) for NeMo-RL clusters and laptops.

The pipeline of one step, and the room each part lives in:

    Problem ─▶ Rollout ─▶ Verdict ─▶ RolloutGroup ─▶ peer context ─▶ TrainBatch ─▶ targets ─▶ update
    data       engines     verifiers  types           peers           methods     engines    engines + losses

`mopd_nemo.trainer` is the loop. Importing this package loads nothing heavy.
"""

__version__ = "0.2.0"
