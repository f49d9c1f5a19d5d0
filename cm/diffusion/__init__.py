"""The mathematics of noise: levels, grids, preconditionings, paths, weightings."""
