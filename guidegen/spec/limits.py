"""How much of each thing is taken; what is past it is refused before anything is read or drawn."""

LIST = 1_000_000
"""Weights, labels, prompts, or ranges of seeds of one flag."""
COMBINATIONS = 1_000
"""Of the values of all `--by`: each is a scheduler and a method of its own."""
WINDOW = 1_000_000
"""Images that are looked through at once while drawing: those without guidance are one image among these."""
GRID_CELLS = 1_000_000
"""Images of a sweep, which all have a place in its grid."""
LISTED_CELLS = 2_000_000
"""Images of a run that `verify`, `merge` and `evaluate` go through one by one."""
SEEDS_OF_A_LABEL = 100_000
"""Of --seeds-per-label: as many as leave 42,949 labels apart in the 32 bits that torch takes of a seed on the CPU."""
