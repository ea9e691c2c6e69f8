"""Plots, reports and comparisons of runs, and analyses of recorded rollouts."""
