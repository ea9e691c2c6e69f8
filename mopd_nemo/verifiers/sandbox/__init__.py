"""A sandbox for hostile Python programs: warm, killable, and as strong as the machine allows.

`layers` isolates it from the machine, `client` drives it from outside, `inside/` runs in it.
"""
