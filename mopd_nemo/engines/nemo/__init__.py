"""NeMo-RL: Megatron training, vLLM rollouts, Ray. The only room that imports nemo_rl, megatron or ray.

Two kinds of module live here. Driver modules run beside the trainer. Worker modules (`rows`, `shadow`,
`scoring`, `dtensor_scoring`, `loss`, `divergence_loss`, `past_self`, `teacher_worker`, `dtensor_worker`, `worker`,
`worker_dtensor`) also run inside NeMo-RL's own environments, where this package is found through `PYTHONPATH` and none
of its dependencies but torch is certain to be there: they import torch, NeMo-RL, Megatron, `mopd_nemo.losses`,
`mopd_nemo.engines.vllm` and one another only.
"""
