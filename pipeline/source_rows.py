"""A source's row, and what a user may say about where rows come from."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from pipeline import store
from pipeline.stages.files import host_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRow:
    """One file that may become clips.

    Attributes:
        source_uri: absolute path or URL; for a manifest row that names no file, the manifest and the row's number.
        caption: as given, or None.
        caption_source: "sidecar", "manifest" or None.
        start_s: first moment to use, or None for the file's start.
        end_s: exclusive, or None for the file's end.
        version: size and time (or tag) of the file, so that a changed file is another source.
        problem: why the row cannot be used, or None.
    """

    source_uri: str
    caption: str | None = None
    caption_source: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    version: str = ""
    problem: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a manifest; the first that a row fills counts.

    Attributes:
        path: names of the column with the file's path or URL.
        caption: of the one with its caption; of a list the first.
        start_s, end_s: of those with the part to use, seconds or h:mm:ss.
        path_suffix: what the paths lack.
        many: caption and times are lists of equal length: one clip for each entry.
    """

    path: tuple[str, ...]
    caption: tuple[str, ...]
    start_s: tuple[str, ...] = ("start_s",)
    end_s: tuple[str, ...] = ("end_s",)
    path_suffix: str = ""
    many: bool = False


LAYOUTS = {
    "auto": Layout(
        path=("video", "path", "file", "video_path", "image_path", "file_name", "uri", "image", "mp4"),
        caption=("caption", "text", "prompt", "cap"),
    ),
    "open_sora": Layout(path=("path",), caption=("text",)),
    "open_sora_plan": Layout(path=("path",), caption=("cap",)),
    "openvid": Layout(path=("video",), caption=("caption",)),
    "panda70m": Layout(path=("videoID",), caption=("caption",), start_s=("timestamp",), path_suffix=".mp4", many=True),
    "kohya": Layout(path=("video_path", "image_path"), caption=("caption",)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How to read a manifest, and which files to use.

    Attributes:
        layout: of a manifest: "auto" (any of the usual column names), "open_sora", "open_sora_plan", "openvid",
            "panda70m" or "kohya".
        path_column: the column with the file, where it has another name.
        caption_column: the column with the caption, where it has another name.
        media_folder: where relative paths of a manifest begin; None is the manifest's own folder.
        include: patterns like `*.mp4` or `*/train/*`; a file must match one, where there are any.
        exclude: patterns; a file must match none.
    """

    layout: str = "auto"
    path_column: str | None = None
    caption_column: str | None = None
    media_folder: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}: must be one of {tuple(LAYOUTS)}")

    def columns(self) -> Layout:
        """The manifest's columns."""
        layout = LAYOUTS[self.layout]
        if self.path_column:
            layout = dataclasses.replace(layout, path=(self.path_column,))
        if self.caption_column:
            layout = dataclasses.replace(layout, caption=(self.caption_column,))
        return layout

    def wants(self, uri: str) -> bool:
        """Whether a file is to be used, by its path or URL."""
        included = not self.include or any(fnmatch.fnmatchcase(uri, pattern) for pattern in self.include)
        return included and not any(fnmatch.fnmatchcase(uri, pattern) for pattern in self.exclude)


def version(info: Mapping[str, Any]) -> str:
    """What changes with a file's content, of what its file system tells."""
    stamp = next(
        (info[key] for key in ("ETag", "etag", "blob_id", "mtime", "LastModified", "created") if key in info), ""
    )
    return f"{info.get('size')} {stamp}"


def version_of(uri: str) -> str:
    """As `version`, asking the file system."""
    try:
        fs, path = store.filesystem(host_file(uri))
        return version(fs.info(path))
    except Exception:  # each file system has its own; the probe says why, as a reject
        return "unreadable"
