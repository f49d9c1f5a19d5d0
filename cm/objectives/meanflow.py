"""MeanFlow (Geng et al. 2025): a flow map from data alone, by the Eulerian identity on the linear path."""

from typing import Any

from cm.objectives.base import Objective
from cm.objectives.flow_map import Adaptive, FlowMapObjective, law_of


def meanflow(config: Any) -> Objective:
    """Row meanflow."""
    weight = Adaptive(config.norm_p, config.norm_c)
    return FlowMapObjective(law=law_of(config), weight=weight, mode=config.training_mode)
