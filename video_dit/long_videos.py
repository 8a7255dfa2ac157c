"""Videos longer than a model makes at once: windows that overlap, each going on from what is there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from video_dit.generator import Generator, OnStep, count_on
from video_dit.given_frames import put_back
from video_dit.requests import Condition, Edit, GenerationRequest

SEEDS_APART = 1_000_003  # of two windows: requests of one batch often have seeds that follow each other


class Window(NamedTuple):
    """Frames start, ..., stop - 1 of a video, sampled at once when those before `known` are there."""

    start: int
    stop: int
    known: int


def long_videos(
    generator: Generator,
    requests: Sequence[GenerationRequest],
    window_frames: int,
    overlap_frames: int,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Make videos of any lengths, window by window; those that fit into one are made as ever.

    Each window is given the last frames of what is there, and its share of the request's conditions and of the video to
    edit. The windows of all requests are made side by side.

    Args:
        generator: makes the windows.
        requests: `num_frames` is that of the whole video.
        window_frames: most frames at once: 1 + a multiple of the model's temporal stride.
        overlap_frames: frames that a window is given of those before it: likewise, and fewer.
        on_step: called with (done, total) after each denoising step, over all windows.

    Raises:
        ValueError: a request the model cannot make, or wrong frames.
    """
    stride = generator.stride.t
    check_windows(window_frames, overlap_frames, stride)
    for request in requests:
        generator.check(request)
    made = [request.sampled(stride) for request in requests]
    plans = [plan_windows(request, window_frames, overlap_frames, stride) for request in made]
    videos = [put_back(torch.zeros(*request.shape, 3, dtype=torch.uint8), request.conditions) for request in made]
    for request, plan, video in zip(made, plans, videos, strict=True):
        for number, window in enumerate(plan):
            generator.check(_part(request, window, number, video))
    rounds = max(map(len, plans))
    for number in range(rounds):
        places = [place for place, plan in enumerate(plans) if number < len(plan)]
        parts = [_part(made[place], plans[place][number], number, videos[place]) for place in places]
        for place, part in zip(places, generator(parts, count_on(on_step, number, rounds)), strict=True):
            videos[place][plans[place][number].start : plans[place][number].stop] = part
    return [video[: request.num_frames] for video, request in zip(videos, requests, strict=True)]


def plan_windows(request: GenerationRequest, window_frames: int, overlap_frames: int, stride: int) -> list[Window]:
    """The windows of one video; behind the first they are about equally long."""
    if request.num_frames <= window_frames:
        return [Window(0, request.num_frames, 0)]
    windows = []
    known = _known(request, 0, stride)
    while known < request.num_frames:
        start = max(0, known - overlap_frames)
        room, left = start + window_frames - known, _goal(request, known, max(stride, overlap_frames - 1)) - known
        groups = left // math.ceil(left / room) // stride  # rounded down: no last window of a single group
        stop = known + groups * stride if known else window_frames
        windows.append(Window(start, stop, known))
        known = _known(request, stop, stride)
    return windows


def _known(request: GenerationRequest, stop: int, stride: int) -> int:
    """Frames known when those before `stop` are: whole groups that are given there, or go on from there, are too."""
    for given in sorted(request.conditions, key=lambda given: given.start):
        if given.start <= stop and (given.stop - 1) % stride == 0:
            stop = max(stop, given.stop)
    return stop


def _goal(request: GenerationRequest, known: int, num_seen: int) -> int:
    """Where the next frames to make end: behind the first ones of the next given run, so that they lead there."""
    runs = [given for given in request.conditions if given.start > known and len(given.frames) > 1]
    return min([min(given.start + num_seen, given.stop) for given in runs], default=request.num_frames)


def _part(request: GenerationRequest, window: Window, number: int, video: Tensor) -> GenerationRequest:
    """The request for one window: frames that are known, the share of what is given, and noise of its own."""
    start, stop, known = window
    before = (Condition(frames=video[start:known]),) if known else ()
    later = tuple(
        Condition(frames=video[max(given.start, known) : min(given.stop, stop)], start=max(given.start, known) - start)
        for given in request.conditions
        if given.stop > known and given.start < stop
    )
    return dataclasses.replace(
        request,
        num_frames=stop - start,
        conditions=before + later,
        edit=request.edit and Edit(frames=request.edit.frames[start:stop], sigma=request.edit.sigma),
        seed=request.seed + SEEDS_APART * number,
    )


def check_windows(window_frames: int, overlap_frames: int, stride: int) -> None:
    """Raise ValueError, naming field, value and fix, for windows that do not suit a model's temporal stride."""
    for name, value in (("window_frames", window_frames), ("overlap_frames", overlap_frames)):
        if value < 1 or (value - 1) % stride:
            low = max(0, value - 1) // stride * stride + 1
            raise ValueError(f"{name}={value}: must be 1 + a multiple of {stride}: use {low} or {low + stride}")
    if overlap_frames >= window_frames:
        raise ValueError(f"overlap_frames={overlap_frames}: must be less than window_frames={window_frames}")
