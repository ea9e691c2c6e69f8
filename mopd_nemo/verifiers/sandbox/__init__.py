"""A sandbox for hostile Python programs: warm, killable, and as strong as the machine allows.

`layers` says what surrounds it, `client` drives it from outside, `inside/` is what runs in it.
"""
