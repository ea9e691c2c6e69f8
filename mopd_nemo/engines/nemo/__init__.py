"""NeMo-RL: Megatron training, vLLM rollouts, Ray. The only room that imports nemo_rl, megatron or ray.

These modules run in the trainer's process; those in `workers` in the processes of NeMo-RL's policies.
"""
