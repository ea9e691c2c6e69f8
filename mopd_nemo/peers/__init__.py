"""The method: from a group of rollouts to the prompt that the teacher of each rollout reads.

    RolloutGroup -> Candidates -> Selection (select) -> user turn -> PeerContext (render)

Pure and seeded: the same rollouts and seed give the same contexts. No engine, no torch.
"""
