"""One Slurm job from one config.

`site` reads the site file, `job` renders the script, `checks` refuses what cannot run, `memory` estimates GPU memory,
`submit` writes and submits. `scripts/` runs inside the job.
"""
