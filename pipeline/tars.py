"""WebDataset shards: tar files whose members with one key (`000.mp4`, `000.txt`, `000.json`) are a sample."""

from __future__ import annotations

import tarfile
from pathlib import PurePosixPath

import fsspec

from pipeline.sidecars import CAPTIONS
from pipeline.source_rows import SourceRow, version_of
from pipeline.stages.container import MEDIA_SUFFIXES
from pipeline.stages.files import member_uri, suffix

MAX_CAPTION_BYTES = 1 << 20


def tar_rows(url: str) -> list[SourceRow]:
    """The videos and pictures of a shard, in its order, unpacked nowhere: a row tells where its file lies.

    Captions are the member `<key>.txt`, or `<key>.json` with the key caption or text.

    A damaged shard is one row more, with a problem, after those that could be read.
    """
    media: list[tarfile.TarInfo] = []
    damage: str | None = None
    captions: dict[str, tuple[str | None, str | None]] = {}
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if suffix(member.name) in MEDIA_SUFFIXES:
                    media.append(member)
                elif suffix(member.name) in CAPTIONS and member.size <= MAX_CAPTION_BYTES:
                    content = tar.extractfile(member)
                    assert content is not None  # a plain file has one
                    captions.setdefault(_key(member.name), CAPTIONS[suffix(member.name)](content.read()))
    except (tarfile.TarError, OSError) as error:
        damage = f"cannot be read as a tar: {error}"
    version, rows = version_of(url), []
    for member in media:
        caption, problem = captions.get(_key(member.name), (None, None))
        rows.append(
            SourceRow(
                source_uri=member_uri(url, member.offset_data, member.size, member.name),
                caption=caption,
                caption_source=None if caption is None else "sidecar",
                version=version,
                problem=problem,
            )
        )
    return rows if damage is None else [*rows, SourceRow(source_uri=url, version=version, problem=damage)]


def _key(name: str) -> str:
    """A member's path up to the first dot of its name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0]))
