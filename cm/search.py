"""The original's script as a library: `cm.sampling.search`."""

from cm.sampling.search import best_point, coarse_to_fine_search, greedy_search, ternary_search

__all__ = ["best_point", "coarse_to_fine_search", "greedy_search", "ternary_search"]
