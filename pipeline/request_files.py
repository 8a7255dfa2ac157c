"""Requests on their way to other processes and into folders: JSON, with the frames they give in files beside it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import store
from video_dit.diffusion.guidance import GuidanceOptions
from video_dit.requests import Condition, Edit, GenerationRequest

Files = dict[str, bytes]


def to_json(request: GenerationRequest) -> tuple[dict[str, Any], Files]:
    """The request's fields, JSON-able, frames as names of files; and those files. A name is a hash of the content."""
    files: Files = {}

    def name_of(frames: Tensor) -> str:
        buffer = io.BytesIO()
        np.save(buffer, frames.numpy(), allow_pickle=False)
        name = f"frames/{store.content_hash(buffer.getvalue())}.npy"
        files[name] = buffer.getvalue()
        return name

    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    fields["guidance"] = dataclasses.asdict(request.guidance)
    fields["conditions"] = [{"frames": name_of(given.frames), "start": given.start} for given in request.conditions]
    if request.edit:
        fields["edit"] = {"frames": name_of(request.edit.frames), "sigma": request.edit.sigma}
    return fields, files


def no_files(name: str) -> bytes:
    """`read` for requests that give no frames."""
    raise FileNotFoundError(f"{name}: the request came without its files")


def from_json(fields: dict[str, Any], read: Callable[[str], bytes]) -> GenerationRequest:
    """The request again; `read` gives a file by its name."""

    def with_frames(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "frames": torch.from_numpy(np.load(io.BytesIO(read(values["frames"])), allow_pickle=False))}

    guidance = GuidanceOptions(**fields.get("guidance", {}))  # requests of older versions have fewer fields
    conditions = tuple(Condition(**with_frames(values)) for values in fields.get("conditions", ()))
    edit = Edit(**with_frames(fields["edit"])) if fields.get("edit") else None
    return GenerationRequest(**{**fields, "guidance": guidance, "conditions": conditions, "edit": edit})
