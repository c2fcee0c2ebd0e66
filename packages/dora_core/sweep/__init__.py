"""``dora sweep``: a recipe trained and scored at every point of a grid, each in a process of its own."""
