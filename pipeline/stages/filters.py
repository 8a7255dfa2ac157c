"""What is wanted of sources and clips: limits on what was measured, each with its own reason to refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.probe import Probe

_SOURCE_LIMITS = {
    "min_side_px": RejectReason.TOO_SMALL,
    "min_aspect": RejectReason.ASPECT,
    "max_aspect": RejectReason.ASPECT,
    "min_fps": RejectReason.LOW_FPS,
    "min_duration_s": RejectReason.TOO_SHORT,
}
_CLIP_LIMITS = {
    "min_motion": RejectReason.LOW_MOTION,
    "max_motion": RejectReason.HIGH_MOTION,
    "min_luma": RejectReason.DARK,
    "max_luma": RejectReason.BRIGHT,
    "min_contrast": RejectReason.LOW_CONTRAST,
    "min_sharpness": RejectReason.BLURRED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Limits; None is none. Those of clips are on `pipeline.stages.score`'s figures.

    Attributes:
        min_side_px: of the source's shorter side.
        min_aspect, max_aspect: of width / height as displayed.
        min_fps: of the source; still pictures pass.
        min_duration_s: of the source; still pictures pass.
        min_motion, max_motion: in shorter sides a second; about 0.02 leaves out what stands still.
        min_luma, max_luma: of the mean, 0 (black) to 1.
        min_contrast: of the standard deviation of luma.
        min_sharpness: of the variance of luma's Laplacian.
    """

    min_side_px: int | None = None
    min_aspect: float | None = None
    max_aspect: float | None = None
    min_fps: float | None = None
    min_duration_s: float | None = None
    min_motion: float | None = None
    max_motion: float | None = None
    min_luma: float | None = None
    max_luma: float | None = None
    min_contrast: float | None = None
    min_sharpness: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: must not be negative")
        for what in ("aspect", "motion", "luma"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{what}={low}: must be at most max_{what}={high}")

    @property
    def needs_scores(self) -> bool:
        """Whether a limit is set that only decoded frames can be held against."""
        return any(getattr(self, name) is not None for name in _CLIP_LIMITS)


def check_source(row: dict[str, Any], *, config: FilterConfig) -> dict[str, Any]:
    """The row, whose `probe` is within the limits.

    Raises:
        ClipRejected: TOO_SMALL, ASPECT, LOW_FPS or TOO_SHORT.
    """
    facts: Probe = row["probe"]
    found = {
        "side_px": min(facts.height_px, facts.width_px),
        "aspect": facts.width_px * facts.pixel_aspect / facts.height_px,
    }
    if facts.fps:
        found |= {"fps": facts.fps, "duration_s": facts.end_s - facts.start_s}
    _check(found, config, _SOURCE_LIMITS)
    return row


def check_scores(row: dict[str, Any], *, config: FilterConfig) -> dict[str, Any]:
    """The row, whose `scores` are within the limits.

    Raises:
        ClipRejected: LOW_MOTION, HIGH_MOTION, DARK, BRIGHT, LOW_CONTRAST or BLURRED.
    """
    _check(dict(row["scores"]), config, _CLIP_LIMITS)
    return row


def _check(found: dict[str, float], config: FilterConfig, limits: dict[str, RejectReason]) -> None:
    for name, reason in limits.items():
        limit, (bound, what) = getattr(config, name), name.split("_", 1)
        if limit is None or what not in found:
            continue
        if found[what] < limit if bound == "min" else found[what] > limit:
            raise ClipRejected(reason, f"{what} {found[what]:.4g}: {name}={limit}")
