"""Code of this package inside the processes of NeMo-RL's policies, in NeMo-RL's own environments.

This package is found there through `PYTHONPATH`, and none of its dependencies but torch is certain to be there. So
these modules import torch, NeMo-RL, Megatron, `mopd_nemo.losses`, the batches of
`mopd_nemo.engines.nemo.batches` and one another only.
"""
