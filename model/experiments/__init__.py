"""The experiments that show what a Mixture of Tokens is worth, at a scale that fits two cores.

``catalogue`` names the runs and ``suite`` trains each at most once; a file an experiment turns them into figures. Knows
models and text; nothing of serving or pictures.
"""
