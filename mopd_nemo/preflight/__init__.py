"""Know before you train: what a model makes of each context that its self-teacher could read.

contexts    contexts by name, and the problems that have them all
measure     what the model writes after each, and how it scores rollouts under it
figures     means with intervals
rule        a recommendation in plain words
output      files for people and programs
"""
