"""Images and videos that a sample is made from: files to frames, and frames to their places in requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import store
from pipeline.errors import ClipRejected, SourceError
from pipeline.stages.reader import ClipReader
from pipeline.stages.split import split
from video_dit.requests import Condition, Edit, GenerationRequest, Limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenConfig:
    """Files that a video is made from. An image file is an image, any other a video; both fill the size asked for.

    Attributes:
        begin: the video begins with it: an image comes to life, a video goes on.
        end: the video ends with it: an image is led to, a video gets a past; with `begin`, what lies between is made.
        loop: a video, or an image, that the new frames lead back to the beginning of; without `begin` and `end`.
        edit: a video to make another of, by the prompt; without the others.
        strength: of the edit: noise level to start from; 0.3 changes details, 0.6 much, at 1 nothing is left of it.
        max_given_frames: most frames of each video, those next to the new ones; None takes all but a few that do not
            fit the model's groups of frames.
    """

    begin: str | None = None
    end: str | None = None
    loop: str | None = None
    edit: str | None = None
    strength: float = 0.6
    max_given_frames: int | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.begin or self.end, self.loop, self.edit))) > 1:
            raise ValueError(
                f"begin={self.begin}, end={self.end}, loop={self.loop}, edit={self.edit}: "
                "give begin, end or both, or one of the others alone"
            )
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength}: must be above 0 (nothing changes) and at most 1")
        if self.max_given_frames is not None and self.max_given_frames < 1:
            raise ValueError(f"max_given_frames={self.max_given_frames}: must be at least 1, or None for all")

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by the name of their field."""
        named = {"begin": self.begin, "end": self.end, "loop": self.loop, "edit": self.edit}
        return {name: file for name, file in named.items() if file}

    def check_files(self) -> None:
        """Raise FileNotFoundError, naming the field, for a file that is not there."""
        for name, file in self.files.items():
            if not store.exists(file):
                raise FileNotFoundError(f"{name}={file}: no such file")

    def put_into(self, requests: Sequence[GenerationRequest], limits: Limits) -> list[GenerationRequest]:
        """The requests, all of one size, with the files' frames.

        Args:
            requests: `num_frames` counts the given frames too.
            limits: of the model: its rate, and its groups of frames.

        Raises:
            SourceError: a file that cannot be read.
            ValueError: no frame would be left to make, or too few for an edit.
        """
        if not self.files:
            return list(requests)
        with ClipReader() as reader:
            given = {name: self._read(reader, name, requests[0], limits) for name in self.files}
        num_frames = requests[0].num_frames
        places = {"begin": 0, "loop": 0, "end": num_frames - len(given.get("end", ()))}
        conditions = tuple(
            Condition(frames=frames, start=places[name]) for name, frames in given.items() if name in places
        )
        edit = Edit(frames=given["edit"], sigma=self.strength) if "edit" in given else None
        return [
            dataclasses.replace(request, conditions=conditions, edit=edit, loop=self.loop is not None)
            for request in requests
        ]

    def _read(self, reader: ClipReader, name: str, request: GenerationRequest, limits: Limits) -> Tensor:
        file = store.absolute(self.files[name])
        try:
            source = _open(reader, file, limits.fps)
            first, stop = self._choose(name, file, source, request.num_frames, limits.stride.t)
            return _decode(reader, file, source, first, stop, request)
        except ClipRejected as error:
            raise SourceError(f"{name}={file}: {error}") from error

    def _choose(self, name: str, file: str, source: _Source, num_frames: int, stride: int) -> tuple[int, int]:
        """Which of a file's frames to take, [first, stop)."""
        found = f"{name}={file}: {source.num_frames} frames at {source.fps:g} fps"
        if name == "edit":
            if source.num_frames < num_frames:
                raise ValueError(f"num_frames={num_frames}: {found}, so that at most as many can be asked for")
            return 0, num_frames
        most = min(source.num_frames, self.max_given_frames or source.num_frames)
        single = 1 if name != "end" else 0  # a beginning is 1 + k groups, an end k groups, or an image
        length = 1 if most == 1 else (most - single) // stride * stride + single
        if not length:
            raise ValueError(f"{found}, of which {most} are to be taken: an end must be 1, or {stride} or more")
        if length >= num_frames:
            raise ValueError(
                f"num_frames={num_frames}: {found}, of which {length} are given; must be more than that, "
                "or give fewer by max_given_frames"
            )
        return (0, length) if name == "end" else (source.num_frames - length, source.num_frames)


class _Source(NamedTuple):
    """A file's frames at the model's rate, or at its own if that is slower, and its size as shown."""

    fps: float
    num_frames: int
    start_s: float
    height_px: int
    width_px: float


def _open(reader: ClipReader, file: str, fps: float) -> _Source:
    facts = reader.probe(file)
    row = {"probe": facts, "start_s": None, "end_s": None}
    whole = 2 * facts.num_frames  # a window is shorter: no frame is repeated
    (window,) = split(row, fps=fps, max_frames=whole, min_frames=1, stride_frames=1)
    width_px = facts.width_px * facts.pixel_aspect
    return _Source(window["fps"], window["num_frames"], window["start_s"], facts.height_px, width_px)


def _decode(
    reader: ClipReader, file: str, source: _Source, first: int, stop: int, request: GenerationRequest
) -> Tensor:
    """Frames [first, stop), t h w 3, scaled to cover the request's size and cut to it around the middle."""
    height_px, width_px = request.height_px, request.width_px
    scale = max(height_px / source.height_px, width_px / source.width_px)
    rows, columns = max(height_px, round(source.height_px * scale)), max(width_px, round(source.width_px * scale))
    clip = reader.read(
        file,
        source.start_s + first / source.fps,
        source.start_s + stop / source.fps,
        fps=source.fps,
        height_px=rows,
        width_px=columns,
        num_frames=stop - first,
    )
    top, left = (rows - height_px) // 2, (columns - width_px) // 2
    cut = clip.video_u8[:, top : top + height_px, left : left + width_px]
    return torch.from_numpy(np.ascontiguousarray(cut))
