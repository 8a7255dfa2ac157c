"""What is asked of a generator: a prompt, sizes, and frames of the video that are there already."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from video_dit.diffusion.guidance import GuidanceOptions
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.shapes import Stride, VideoShape


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """Frames that a video must hold; `video_dit.conditions` builds requests with them.

    Attributes:
        frames: uint8 t h w 3, RGB.
        start: which frame of the video the first of them is, 0, 1, ...
    """

    frames: Tensor
    start: int = 0

    def __post_init__(self) -> None:
        _check_frames("frames", self.frames)
        if self.start < 0:
            raise ValueError(f"start={self.start}: must be at least 0, the first frame")

    @property
    def stop(self) -> int:
        """The frame behind the last one."""
        return self.start + len(self.frames)

    def latent_frames(self, stride: int) -> range:
        """The latent frames it describes: the first frame has one of its own, then `stride` frames share one."""
        return range(-(-self.start // stride), -(-(self.stop - 1) // stride) + 1)

    def check_groups(self, stride: int) -> None:
        """Raise ValueError if it gives more than one frame and covers the frames of a latent in part."""
        num_frames, first, last = len(self.frames), self.start, self.stop - 1
        begins, ends = first == 0 or (first - 1) % stride == 0, last % stride == 0
        if num_frames == 1 or (begins and ends):
            return
        if not (begins or ends):
            low = (first - 1) // stride * stride + 1
            raise ValueError(
                f"start={first}: a run of frames begins at 0 or 1 + a multiple of {stride}: use {low} or {low + stride}"
            )
        alone = 1 if first == 0 else 0  # the first frame, which is a latent by itself
        low = (num_frames - alone) // stride * stride + alone
        fits = f"{low} or {low + stride}" if low else f"{stride}"
        rule = f"1 + a multiple of {stride}" if alone else f"a multiple of {stride}, or 1"
        raise ValueError(f"frames: {num_frames} from frame {first} on, must be {rule}: use {fits}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A video to make another of (SDEdit, arXiv 2108.01073): sampling starts from it, with noise in it.

    Attributes:
        frames: uint8 t h w 3, RGB; of the size that is asked for.
        sigma: noise level to start from, up to 1: how little is kept. 0.5 keeps the layout, 0.9 little but colours.
    """

    frames: Tensor
    sigma: float

    def __post_init__(self) -> None:
        _check_frames("edit.frames", self.frames)
        if not 0 < self.sigma <= 1:
            raise ValueError(
                f"edit.sigma={self.sigma}: must be above 0 (nothing changes) and at most 1 (nothing is kept)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video to make.

    Attributes:
        prompt: what it shows.
        height_px, width_px: sides, multiples of the model's stride.
        num_frames: 1 (an image) or 1 + a multiple of the model's temporal stride.
        num_steps: denoising steps; None is the model's own number.
        guidance_scale: classifier-free guidance; 1 is none, None the model's own scale.
        guidance: its refinements.
        negative_prompt: what guidance leads away from; empty is the unconditional model.
        seed: the same request with the same seed gives the same video.
        sampler: a name in `video_dit.diffusion.samplers.SAMPLERS`.
        cache_threshold: relative change up to which most of the model is not run in a step; see `StepCache`. 0 always
            runs it; above 0 is faster and not exact.
        conditions: frames that the video must hold, at their places.
        edit: a video to start from, instead of noise alone.
        loop: whether the video leads back to its beginning, which must be given: repeated, it has no seam.
    """

    prompt: str
    height_px: int
    width_px: int
    num_frames: int
    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    negative_prompt: str = ""
    seed: int = 0
    sampler: str = "euler"
    cache_threshold: float = 0.0
    conditions: tuple[Condition, ...] = ()
    edit: Edit | None = None
    loop: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))  # JSON has lists
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: must be at least 1")
        if self.cache_threshold < 0:
            raise ValueError(f"cache_threshold={self.cache_threshold}: must be at least 0, which caches nothing")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be between 0 and 100; 1 is no guidance")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r}: known are {', '.join(SAMPLERS)}")
        for number, condition in enumerate(self.conditions):
            self._check_condition(f"conditions[{number}]", condition)
        if self.edit and self.edit.frames.shape[:3] != self.shape:
            raise ValueError(f"edit.frames: {_size(self.edit.frames)}, must be {self._size}, what is asked for")
        if self.loop and (self.edit or self._beginning is None):
            raise ValueError("loop=True: conditions must give the frames from 0 on, and edit must be None")

    def _check_condition(self, name: str, condition: Condition) -> None:
        if condition.frames.shape[1:3] != self.shape[1:]:
            raise ValueError(f"{name}.frames: {_size(condition.frames)}, must be of {self.height_px}x{self.width_px}")
        if condition.stop > self.num_frames:
            raise ValueError(
                f"num_frames={self.num_frames}: {name} gives frames {condition.start} to {condition.stop - 1}, "
                f"must be at least {condition.stop}"
            )

    @property
    def shape(self) -> VideoShape:
        """The video in pixels."""
        return VideoShape(self.num_frames, self.height_px, self.width_px)

    @property
    def _size(self) -> str:
        return f"{self.num_frames} frames of {self.height_px}x{self.width_px}"

    @property
    def _beginning(self) -> Condition | None:
        return next((condition for condition in self.conditions if condition.start == 0), None)

    def sampled(self, stride: int) -> GenerationRequest:
        """The request that is sampled: a loop's goes on into its beginning, which the result leaves out."""
        if not self.loop:
            return self
        assert self._beginning is not None
        given = self._beginning.frames
        again = Condition(frames=given[: stride if len(given) > stride else 1], start=self.num_frames)
        return dataclasses.replace(
            self, num_frames=self.num_frames + stride, conditions=(*self.conditions, again), loop=False
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model can make.

    Attributes:
        stride: frames, rows and columns that one token covers: sides are multiples, frames 1 + a multiple.
        fps: frames per second of the clips it was trained on.
        num_steps, guidance_scale: what it is meant to be sampled with.
    """

    stride: Stride
    fps: float
    num_steps: int = 20
    guidance_scale: float = 4.0

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the model's own number of steps and scale where it names none.

        Raises:
            ValueError: the model cannot make this; see `check`.
        """
        self.check(request)
        return dataclasses.replace(
            request,
            num_steps=self.num_steps if request.num_steps is None else request.num_steps,
            guidance_scale=self.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        )

    def check(self, request: GenerationRequest) -> None:
        """Raise ValueError, naming field, value and fix, if the model cannot make this."""
        request.shape.latent(self.stride)
        made = request.sampled(self.stride.t)
        taken: dict[int, str] = {}
        for number, condition in enumerate(made.conditions):
            self._take(f"conditions[{number}]", condition, taken)
        if len(taken) == made.shape.latent(self.stride).t:
            raise ValueError(
                f"num_frames={request.num_frames}: all of them are given, must be more: at least one is made"
            )

    def _take(self, name: str, condition: Condition, taken: dict[int, str]) -> None:
        """Note which condition gives a latent frame, in `taken`; only one may."""
        stride = self.stride.t
        try:
            condition.check_groups(stride)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        for place in condition.latent_frames(stride):
            if place in taken:
                first, last = max(0, (place - 1) * stride + 1), place * stride
                raise ValueError(
                    f"{name}: {taken[place]} gives some of the frames {first} to {last} too, which are made as one; "
                    "one condition must give them"
                )
            taken[place] = name


def _check_frames(name: str, frames: Tensor) -> None:
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        found = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
        raise ValueError(f"{name}: {found}, must be a uint8 tensor t h w 3; an image is picture[None]")
    if not len(frames):
        raise ValueError(f"{name}: no frames, must be at least 1")


def _size(frames: Tensor) -> str:
    num_frames, height_px, width_px, _ = frames.shape
    return f"{num_frames} frames of {height_px}x{width_px}"
