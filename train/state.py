"""The counts of a run. Displays and reports use them before torch is loaded, so this module does not import it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """Counts of a run, saved in every checkpoint. Times are seconds, `images` counts over all ranks."""

    step: int = 0
    images: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_step: int = 0
    """The step of `loss_last`, which is read at logging steps only."""
    train_s: float = 0.0
    wait_s: float = 0.0
    bad_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    first_feature_std: float | None = None
    collapsed: bool = False
    alarms: list[int] = field(default_factory=list)
    """Steps at which the collapse alarm was raised."""
    knn: float | None = None
    """Percent, at the latest measurement during the run."""
    knn_step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
