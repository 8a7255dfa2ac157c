"""Videos from images and videos: requests for the ways that users know.

    image_to_video      [image]..........           first_last      [first].......[last]
    extend_forwards     [ video ]........           in_between      [first]...[ second ]
    extend_backwards    ........[ video ]           loop            [ video ]..., and from the start again
    edit                another video from this one

Frames in brackets come back as they were given; the others are made. Each function takes uint8 frames `t h w 3`, or an
image `h w 3`, and the request's other fields: `image_to_video(image, num_frames=49, prompt="a cat wakes up", seed=3)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from video_dit.requests import Condition, Edit, GenerationRequest


def image_to_video(image: Tensor, num_frames: int, **fields: Any) -> GenerationRequest:
    """A video that begins with an image, h w 3."""
    return _request(image.shape, num_frames, fields, Condition(frames=image[None]))


def first_last(first: Tensor, last: Tensor, num_frames: int, **fields: Any) -> GenerationRequest:
    """A video from one image, h w 3, to another."""
    end = Condition(frames=last[None], start=num_frames - 1)
    return _request(first.shape, num_frames, fields, Condition(frames=first[None]), end)


def extend_forwards(video: Tensor, num_new_frames: int, **fields: Any) -> GenerationRequest:
    """A video of 1 + 4 k frames (4: the model's temporal stride) and, behind it, a multiple of 4 new ones."""
    return _request(video.shape[1:], len(video) + num_new_frames, fields, Condition(frames=video))


def extend_backwards(video: Tensor, num_new_frames: int, **fields: Any) -> GenerationRequest:
    """A video of 4 k frames (4: the model's temporal stride) and, before it, 1 + a multiple of 4 new ones."""
    condition = Condition(frames=video, start=num_new_frames)
    return _request(video.shape[1:], len(video) + num_new_frames, fields, condition)


def in_between(first: Tensor, second: Tensor, gap: int, **fields: Any) -> GenerationRequest:
    """A video of 1 + 4 k frames, a gap of 4 k new ones, and another video of 4 k (4: the model's temporal stride)."""
    start = len(first) + gap
    conditions = (Condition(frames=first), Condition(frames=second, start=start))
    return _request(first.shape[1:], start + len(second), fields, *conditions)


def loop(video: Tensor, gap: int, **fields: Any) -> GenerationRequest:
    """A video of 1 + 4 k frames and 4 k new ones that lead back to its first (4: the model's temporal stride)."""
    request = _request(video.shape[1:], len(video) + gap, fields, Condition(frames=video))
    return dataclasses.replace(request, loop=True)


def edit(video: Tensor, sigma: float, **fields: Any) -> GenerationRequest:
    """Another video from this one: see `Edit`."""
    request = _request(video.shape[1:], len(video), fields)
    return dataclasses.replace(request, edit=Edit(frames=video, sigma=sigma))


def _request(size: Any, num_frames: int, fields: dict[str, Any], *conditions: Condition) -> GenerationRequest:
    height_px, width_px, _ = size
    return GenerationRequest(
        height_px=height_px, width_px=width_px, num_frames=num_frames, conditions=conditions, **fields
    )
