"""Captions that stand in a small file beside a video."""

import json
from collections.abc import Callable


def text_caption(data: bytes) -> tuple[str | None, str | None]:
    """The caption of a `.txt`, and what is wrong with it."""
    return data.decode(errors="replace").strip() or None, None


def json_caption(data: bytes) -> tuple[str | None, str | None]:
    """The caption of a `.json`, and what is wrong with it."""
    try:
        fields = json.loads(data)
    except ValueError as error:
        return None, f"its sidecar .json cannot be read: {error}"
    if not isinstance(fields, dict):
        return None, f"its sidecar .json holds a {type(fields).__name__}, not an object"
    text = fields.get("caption", fields.get("text"))
    return (text.strip() or None, None) if isinstance(text, str) else (None, None)


# In the order in which they are looked for.
CAPTIONS: dict[str, Callable[[bytes], tuple[str | None, str | None]]] = {".txt": text_caption, ".json": json_caption}
