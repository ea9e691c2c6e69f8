"""NeMo-RL: Megatron training, vLLM rollouts, Ray. The only room that imports nemo_rl, megatron or ray.

The modules here run beside the trainer. Those in `workers` run in the processes of NeMo-RL's policies.
"""
