"""What can go wrong, as types.

KinorayError                a user can act on it; the message names the field or file, the value and the fix
├── SourceError             the given source holds nothing usable, or cannot be read
├── ManifestError           a folder is not what a hop published, or is not complete
├── TooManyRejectsError     a hop refused more rows than its config allows
├── TrainingDivergedError   a loss or gradient is not finite; the update was not made
├── TrainingStoppedError    somebody stopped a training run; it goes on from a checkpoint
├── RunBusyError            another process trains the same run
├── RunTakenOverError       a newer attempt trains the same run; this one must not write any more
└── ClipRejected            one row cannot be used; becomes a row of REJECTS, never a lost row
"""

from enum import StrEnum


class RejectReason(StrEnum):
    """Why a row was refused. The value is what stands in the REJECTS table."""

    UNREADABLE = "unreadable"  # no decoder can open the file
    NOT_VIDEO = "not_video"  # opened, but no usable video stream (audio only, cover art, text)
    NO_FRAMES = "no_frames"  # a stream without a single decodable frame
    TOO_SHORT = "too_short"  # fewer frames, or seconds, than the policy asks for
    TOO_LONG = "too_long"  # more tokens than a pack of the training plan holds
    TOO_SMALL = "too_small"  # a side below the model's stride, or the policy's limit
    TOO_LARGE = "too_large"  # pixels or frames above the decode limit
    HDR = "hdr"  # PQ or HLG transfer: not what 8 bits of RGB can hold
    BAD_TIMES = "bad_times"  # timestamps missing, not finite or not increasing
    WRONG_FRAMES = "wrong_frames"  # count, shape or content differs from what was announced
    TIMEOUT = "timeout"  # the decoder was killed by the clock
    CRASHED = "crashed"  # the decoder process died
    QUARANTINED = "quarantined"  # worker processes died, again and again, that worked on it
    ASPECT = "aspect"  # too wide or too high for the policy
    LOW_FPS = "low_fps"  # fewer frames a second than the policy asks for
    LOW_MOTION = "low_motion"  # these and the next: see pipeline/stages/score.py
    HIGH_MOTION = "high_motion"
    DARK = "dark"
    BRIGHT = "bright"
    LOW_CONTRAST = "low_contrast"
    BLURRED = "blurred"
    NO_CAPTION = "no_caption"  # no caption found and the config asks for one
    CAPTION_FAILED = "caption_failed"  # who was to see the frames gave no answer
    BAD_ROW = "bad_row"  # a manifest row without its required columns
    DUPLICATE = "duplicate"  # the same clip id came before in the same set
    NEAR_DUPLICATE = "near_duplicate"  # a clip that looks nearly the same came before


class KinorayError(Exception):
    """Base of every error a user can act on."""


class SourceError(KinorayError):
    """The source holds nothing usable, or cannot be read."""


class ManifestError(KinorayError):
    """A folder is not what a hop published, or is not complete."""


class TooManyRejectsError(KinorayError):
    """A hop refused more rows than its config allows."""


class TrainingDivergedError(KinorayError):
    """A loss or gradient is not finite. The message carries the step and the sample ids."""


class TrainingStoppedError(KinorayError):
    """A training run was stopped on purpose, after a checkpoint."""


class RunBusyError(KinorayError):
    """Another process trains the same run."""


class RunTakenOverError(KinorayError):
    """A newer attempt trains the same run; this one must not write any more."""


class ClipRejected(KinorayError):  # noqa: N818 - a verdict on one row, not a fault of the program
    """One row cannot be used.

    Attributes:
        reason: the machine-readable reason.
        detail: one line for people: the value that was found and the rule it breaks.
    """

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
