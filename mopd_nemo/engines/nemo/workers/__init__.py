"""Code of this package inside the processes of NeMo-RL's policies, in NeMo-RL's own environments.

Workers find this package through `PYTHONPATH`. Of its dependencies, only torch is certain to be installed there. So
these modules import only torch, NeMo-RL, Megatron, `mopd_nemo.losses`, `engines.nemo.batches` and one another.
"""
