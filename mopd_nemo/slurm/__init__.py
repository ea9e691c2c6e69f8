"""One Slurm job from one config.

`site` reads the site file, `job` renders the script, `memory` estimates GPU memory, `submit` refuses jobs that would
fail, writes and submits the others. `scripts/` runs inside the job.
"""
