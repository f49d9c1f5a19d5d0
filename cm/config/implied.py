"""What `--precond` brings besides its scalings: the columns of EDM's Table 1 as flags. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of Table 1 (Karras et al. 2022).

    span: the noise levels that its network can tell apart; None: as it was trained. model: flags of every training
    script that its range needs. training: its noise distribution and weighting, flags of edm_train.
    """

    span: tuple[float, float] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


COLUMNS: dict[str, Column] = {
    "edm": Column(),
    # sigma(t) for t from 1e-5 to 1
    "vp": Column((0.001, 152.17), {}, {"schedule_sampler": "vp", "weight_schedule": "snr"}),
    "ve": Column(
        None, {"sigma_min": 0.02, "sigma_max": 100.0}, {"schedule_sampler": "ve", "weight_schedule": "snr"}
    ),
    # u_999 and u_0
    "iddpm": Column(
        (0.0064, 20291.2), {"sigma_min": 0.0065}, {"schedule_sampler": "iddpm", "weight_schedule": "snr"}
    ),
}


def column_flags(name: str, script: str) -> dict[str, Any]:
    """Flags that `--precond name` sets for a training script; other scripts learn them from the model file."""
    column = COLUMNS.get(name)
    if column is None or script not in ("edm_train", "cm_train"):
        return {}
    return {**column.model, **(column.training if script == "edm_train" else {})}
