"""Peers in NeMo-RL's own distillation loop: its `setup` and `distillation_train`, its config, data and environments.

A run of `engine: nemo` is this project's trainer on NeMo-RL's workers. Here NeMo-RL's loop runs, unchanged. It is given
a teacher that reads peers (`teacher.PeerTeacher`), a student whose past self can be that teacher
(`student.StudentPolicy`), and the divergence as its loss (`workers.divergence_loss`).
"""
