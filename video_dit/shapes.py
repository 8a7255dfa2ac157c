"""Axis legend and the arithmetic between pixels, latents and tokens.

Axes, in the whole project:
    b  batch            t  frames (nothing else)      h w  rows and columns      c  channels
    n  video tokens     s  text tokens                d    model width           heads, e  attention heads, head width

Floating video and latents are `b c t h w`; uint8 frames, at the file edges only, are `t h w c` RGB.
"""

from __future__ import annotations

from typing import NamedTuple


class Stride(NamedTuple):
    """How many frames, rows and columns one step of a coarser grid covers."""

    t: int
    h: int
    w: int


class VideoShape(NamedTuple):
    """Frames, rows and columns of a video in pixels."""

    t: int
    h: int
    w: int

    def latent(self, stride: Stride) -> LatentShape:
        """The VAE's latent grid: the first frame stands alone, then groups of `stride.t`.

        Raises:
            ValueError: frames are not 1 + k * stride.t, or a side is not a multiple of the stride.
        """
        if self.t < 1 or (self.t - 1) % stride.t:
            fits = max(0, self.t - 1) // stride.t * stride.t + 1
            raise ValueError(
                f"num_frames={self.t} is not 1 + a multiple of {stride.t}: use {fits} or {fits + stride.t}"
            )
        for name, side, step in (("height_px", self.h, stride.h), ("width_px", self.w, stride.w)):
            if side < step or side % step:
                fits = max(step, side // step * step)
                raise ValueError(f"{name}={side} is not a multiple of {step}: use {fits} or {fits + step}")
        return LatentShape((self.t - 1) // stride.t + 1, self.h // stride.h, self.w // stride.w)


class LatentShape(NamedTuple):
    """Frames, rows and columns of a latent."""

    t: int
    h: int
    w: int

    def video(self, stride: Stride) -> VideoShape:
        """The pixels this latent decodes to."""
        return VideoShape((self.t - 1) * stride.t + 1, self.h * stride.h, self.w * stride.w)

    def grid(self, patch: Stride) -> TokenGrid:
        """The transformer's token grid.

        Raises:
            ValueError: a side is not a multiple of the patch.
        """
        for name, side, step in zip(("frames", "rows", "columns"), self, patch, strict=True):
            if side < step or side % step:
                raise ValueError(f"latent {name}={side} is not a multiple of the patch {step}")
        return TokenGrid(self.t // patch.t, self.h // patch.h, self.w // patch.w)


class TokenGrid(NamedTuple):
    """Frames, rows and columns of a sample in tokens."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the grid."""
        return self.t * self.h * self.w
