"""What keeps a run sound: steps with non-finite numbers are left out, and collapsing features raise an alarm."""

import torch
import torch.distributed as dist

from train.state import RunState


class StepGuard:
    """Decides on the device whether a step counts, so that no step waits for it; `read` alone does."""

    def __init__(self, device: torch.device, state: RunState) -> None:
        self._skipped = torch.tensor(float(state.skipped_steps), device=device, dtype=torch.float64)
        self._in_a_row = torch.tensor(float(state.skipped_in_a_row), device=device)

    def check(self, losses: list[torch.Tensor], grad_norm: torch.Tensor) -> torch.Tensor:
        """`[] float32`: 1.0 if one of them is infinite or not a number, on any rank, else 0.0. Counts the step."""
        skip = 1 - torch.stack([*losses, grad_norm]).detach().isfinite().all().float()
        if dist.is_initialized():
            dist.all_reduce(skip, dist.ReduceOp.MAX)  # a rank that alone left out a step would part from the others
        self._skipped += skip
        self._in_a_row = (self._in_a_row + 1) * skip
        return skip

    def read(self, state: RunState) -> None:
        """Put the counts into `state`."""
        state.skipped_steps, state.skipped_in_a_row = int(self._skipped), int(self._in_a_row)


class CollapseAlarm:
    """Rings when the pooled features of a logging step lie in almost no dimensions, or are almost one point.

    It rings once, and again only after both signals have recovered. What it remembers is kept in `RunState`.
    """

    RANK_SHARE = 0.05  # of the greatest possible RankMe; healthy runs of small encoders stay above twice that
    STD_SHARE = 0.01  # of the first logged standard deviation
    RECOVERED = 1.5  # times the thresholds, so that a signal at the threshold does not ring at every step

    def __init__(self, width: int) -> None:
        self._width = width

    def check(self, state: RunState, signals: dict[str, float], rows: int) -> str | None:
        """The alarm's text if it starts to ring. `signals`: `rankme` and `feature_std` of `rows` features."""
        rank, std = signals["rankme"], signals["feature_std"]
        if state.first_feature_std is None:
            state.first_feature_std = std
        least_rank = max(2.0, self.RANK_SHARE * min(self._width, rows))
        least_std = self.STD_SHARE * state.first_feature_std
        if state.collapsed:
            state.collapsed = rank < self.RECOVERED * least_rank or std < self.RECOVERED * least_std
            return None
        if rank >= least_rank and std >= least_std:
            return None
        state.collapsed = True
        state.alarms.append(state.step)
        return (
            f"collapse alarm at step {state.step}: RankMe {rank:.2f} (alarm below {least_rank:.2f}), feature std {std:.2g} "
            f"(alarm below {least_std:.2g}). The images' features are becoming the same: raise loss.view_weight or "
            "loss.sigreg_weight, lower training.lr, or bring training.ema_momentum nearer to 1"
        )
