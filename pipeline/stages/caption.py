"""A caption for every clip, and where it came from."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import ClipRejected, RejectReason

FALLBACKS = ("filename", "empty", "reject")


def caption(row: dict[str, Any], *, fallback: str) -> dict[str, Any]:
    """The row with caption and lineage.

    Args:
        row: has `probe`, and caption and caption_source as its source gave them, or None.
        fallback: what to do without a caption: "filename" takes the words of the file's name, "empty" the empty
            caption, "reject" refuses the row. lineage.caption_source tells which it was.

    Raises:
        ClipRejected: NO_CAPTION.
    """
    text, origin = row["caption"], row["caption_source"]
    if text is None and fallback == "reject":
        raise ClipRejected(RejectReason.NO_CAPTION, "no sidecar file and no manifest column holds a caption")
    if text is None:
        text = filename_words(row["source_uri"]) if fallback == "filename" else ""
        origin = "filename" if text else "empty"
    lineage = {"source_id": row["probe"].source_id, "caption_source": origin}
    return {**row, "caption": text, "lineage": lineage, "scores": []}


def filename_words(uri: str) -> str:
    """The words of a file's name; `_` and `-` part words, numbers are left out."""
    words = re.split(r"[\s_\-]+", PurePosixPath(uri).stem)
    return " ".join(word for word in words if word and not word.isdigit())
