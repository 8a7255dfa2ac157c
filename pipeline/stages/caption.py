"""A caption for every clip, and where it came from: given, made of the file's name, or told by who sees its frames."""

from __future__ import annotations

import dataclasses
import re
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Protocol

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import guard
from pipeline.stages.caption_answer import Answer, accept
from pipeline.stages.files import host_file
from pipeline.stages.probe import Probe
from pipeline.stages.window import Clip, Video

SEEING = ("endpoint", "model")
FALLBACKS = ("filename", "empty", "reject", "template", *SEEING)
TEMPLATE = "a video of {folder_words}, {stem_words}"
TEMPLATE_FIELDS = ("folder", "folder_words", "stem", "stem_words", "caption")
PROMPT = (
    "Write a caption that could be used to train a text-to-video model: one paragraph of 40 to 80 words in plain "
    "English. Say who or what is shown and how it looks, what it does from beginning to end, the setting, the shot and "
    "how the camera moves, and the light and colours. State only what can be seen: no names, no guesses, no sounds. Do "
    "not speak of frames or pictures. Answer with the caption alone."
)

_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """What stands in where a source gives no caption. From `url` on, the fields are for "endpoint" and "model".

    Attributes:
        fallback: "filename" takes the words of the file's name, "empty" the empty caption, "reject" refuses the source,
            "template" fills `template`; for each clip by its frames, "endpoint" asks a vision-language model behind
            `url`, "model" one that transformers loads.
        template: text with {folder} and {stem}, the names of the file's folder and of the file without its extension,
            {folder_words} and {stem_words}, their words without numbers, and {caption}, as given or nothing.
        recaption: also replace captions that are given; for "template", "endpoint" and "model".
        url: of any server that speaks OpenAI's protocol (vLLM, SGLang, Ollama, LM Studio), such as http://host:8000/v1.
            Its key, if it wants one, is in the environment variable KINORAY_CAPTION_API_KEY of the workers.
        model: the model's name as the server knows it; for "model" a local folder or a name on the Hugging Face Hub.
        prompt: what is asked, after the frames.
        num_frames: most frames shown, evenly over the clip.
        max_side_px: larger frames are scaled down.
        max_tokens: longest answer.
        min_words, max_words: of an accepted caption, as blanks part them: take 1 where the language has none.
        timeout_s: clock limit of one request.
        num_tries: of a request that the server does not answer, or answers with "too busy" or a fault of its own.
        num_concurrent: requests of one worker that are under way at once.
    """

    fallback: str = "filename"
    template: str = TEMPLATE
    recaption: bool = False
    url: str | None = None
    model: str | None = None
    prompt: str = PROMPT
    num_frames: int = 8
    max_side_px: int = 512
    max_tokens: int = 512
    min_words: int = 4
    max_words: int = 200
    timeout_s: float = 120.0
    num_tries: int = 5
    num_concurrent: int = 8

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback={self.fallback!r}: must be one of {FALLBACKS}")
        unknown = sorted({*_FIELD.findall(self.template)} - {*TEMPLATE_FIELDS})
        if unknown:
            raise ValueError(f"template={self.template!r}: {unknown} must be among {TEMPLATE_FIELDS}")
        if self.recaption and self.fallback not in ("template", *SEEING):
            raise ValueError(f"recaption=True: fallback={self.fallback!r} must be one of {('template', *SEEING)}")
        for name in ("num_frames", "max_side_px", "max_tokens", "min_words", "num_tries", "num_concurrent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be above 0")
        if self.max_words < self.min_words:
            raise ValueError(f"max_words={self.max_words}: must be at least min_words={self.min_words}")
        if self.needs_frames and not self.model:
            raise ValueError(f"model={self.model!r}: fallback={self.fallback!r} needs its name")
        if self.fallback == "endpoint":
            _check_url(self.url)

    @property
    def needs_frames(self) -> bool:
        """Whether captions are made of frames, clip by clip."""
        return self.fallback in SEEING

    @property
    def seer(self) -> str:
        """Who sees the frames: "endpoint:<model>" or "model:<model>", the caption_source of what it says."""
        return f"{self.fallback}:{self.model}"


def _check_url(url: str | None) -> None:
    try:
        parts = urllib.parse.urlsplit(url or "")
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good:
        raise ValueError(f"url={url!r}: must be an http or https URL such as http://host:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: it may be a secret
        rule = "must have no user, password, query or fragment; a key belongs in KINORAY_CAPTION_API_KEY"
        raise ValueError(f"url of {parts.hostname}: {rule}")


# --- of a source ----------------------------------------------------------------------------------------------------


def caption(row: dict[str, Any], *, fallback: str, template: str = TEMPLATE, recaption: bool = False) -> dict[str, Any]:
    """The row with caption and lineage; both captions are None where `caption_clip` is to make them.

    Args:
        row: a source with `probe`, and caption and caption_source as given, or None.
        fallback, template, recaption: see `CaptionConfig`. lineage.caption_source tells which it was.

    Raises:
        ClipRejected: NO_CAPTION.
    """
    text, origin = row["caption"], row["caption_source"]
    if text is None or (recaption and fallback == "template"):
        text, origin = _stand_in(row, fallback, template)
    lineage = {"source_id": row["probe"].source_id, "caption_source": origin}
    return {**row, "caption": text, "lineage": lineage, "scores": []}


def _stand_in(row: dict[str, Any], fallback: str, template: str) -> tuple[str | None, str | None]:
    """Caption and caption_source."""
    if fallback == "reject":
        raise ClipRejected(RejectReason.NO_CAPTION, "no sidecar file and no manifest column holds a caption")
    if fallback in SEEING:
        return None, None
    text = ""
    if fallback == "filename":
        text = filename_words(row["source_uri"])
    elif fallback == "template":
        text = fill_template(template, row["source_uri"], row["caption"])
    return text, fallback if text else "empty"


def fill_template(template: str, uri: str, given: str | None = None) -> str:
    """The template with the names of a file and the caption that it was given, on one line; see `CaptionConfig`."""
    path = _path(uri)
    values = {
        "folder": path.parent.name,
        "folder_words": _words(path.parent.name),
        "stem": path.stem,
        "stem_words": _words(path.stem),
        "caption": given or "",
    }
    text = _FIELD.sub(lambda field: values[field[1]], template)
    return " ".join(text.split()).strip(" ,;")  # the edge of a field that is empty


def filename_words(uri: str) -> str:
    """The words of a file's name; `_` and `-` part words, numbers are left out."""
    return _words(_path(uri).stem)


def _path(uri: str) -> PurePosixPath:
    """A file's path; a tar or a Parquet file is a folder."""
    host = host_file(uri)
    return PurePosixPath(uri) if host == uri else PurePosixPath(host).with_suffix("") / uri.rsplit("#", 1)[1]


def _words(name: str) -> str:
    return " ".join(word for word in re.split(r"[\s_\-]+", name) if word and not word.isdigit())


# --- of a clip ------------------------------------------------------------------------------------------------------


class Captioner(Protocol):
    """Who sees frames and says what they show: see `pipeline.stages.captioners`."""

    config: CaptionConfig

    def describe(self, frames_u8: Video) -> Answer:
        """Raw words for frames t h w 3 of one clip. Any thread may call it.

        Raises:
            ClipRejected: CAPTION_FAILED.
        """


def caption_clip(row: dict[str, Any], *, read: Callable[..., Clip], captioner: Captioner) -> dict[str, Any]:
    """The row with a caption by its frames, if it has none yet or `recaption` is set.

    Args:
        row: a window, with `probe`, caption and lineage.
        read: `ClipReader.read`.
        captioner: who sees the frames.

    Raises:
        ClipRejected: the clip cannot be decoded; CAPTION_FAILED, the captioner gives no answer; NO_CAPTION, its answer
            is no caption.
    """
    if not _is_due(row, captioner.config):
        return row
    return _told(row, _look(row, read, captioner.config), captioner)


def caption_rows(
    rows: Sequence[dict[str, Any]], *, read: Callable[..., Clip], captioner: Captioner, num_concurrent: int
) -> list[dict[str, Any]]:
    """`caption_clip` of every row that is not rejected, a row for a row and in their order.

    Frames are read in this thread, and answers are waited for in others: a reader is for one thread, a server for many.

    Args:
        rows: as `guard.run_stages` gives them; a verdict is written into its row.
        read, captioner: see `caption_clip`.
        num_concurrent: questions under way at once, and so many clips' frames in memory.
    """
    room = threading.Semaphore(num_concurrent)

    def ask(row: dict[str, Any], frames_u8: Video) -> dict[str, Any]:
        try:
            return _told(row, frames_u8, captioner)
        except ClipRejected as verdict:
            return guard.reject(row, "caption_clip", verdict)
        finally:
            room.release()

    found: list[dict[str, Any] | Future[dict[str, Any]]] = []
    with ThreadPoolExecutor(num_concurrent) as pool:
        for row in rows:
            if row["reject_reason"] is not None or not _is_due(row, captioner.config):
                found.append(row)
                continue
            room.acquire()
            try:
                frames_u8 = _look(row, read, captioner.config)
            except ClipRejected as verdict:
                room.release()
                found.append(guard.reject(row, "caption_clip", verdict))
            else:
                found.append(pool.submit(ask, row, frames_u8))
    return [row.result() if isinstance(row, Future) else row for row in found]


def _is_due(row: dict[str, Any], config: CaptionConfig) -> bool:
    return row["lineage"]["caption_source"] is None or config.recaption


def _look(row: dict[str, Any], read: Callable[..., Clip], config: CaptionConfig) -> Video:
    """Frames of the clip at the source's own size, within the limits: the middles of equal parts of it."""
    facts: Probe = row["probe"]
    num_frames = min(config.num_frames, row["num_frames"])
    step = row["num_frames"] / num_frames  # from one to the next, in frames of the clip
    height, width = facts.height_px, facts.width_px * facts.pixel_aspect
    scale = min(1.0, config.max_side_px / max(height, width))
    clip = read(
        row["source_uri"],
        row["start_s"] + (step - 1) / 2 / row["fps"],
        row["end_s"],
        fps=row["fps"] / step,
        num_frames=num_frames,
        height_px=max(1, round(height * scale)),
        width_px=max(1, round(width * scale)),
    )
    return clip.video_u8


def _told(row: dict[str, Any], frames_u8: Video, captioner: Captioner) -> dict[str, Any]:
    config = captioner.config
    text = accept(captioner.describe(frames_u8), min_words=config.min_words, max_words=config.max_words)
    return {**row, "caption": text, "lineage": {**row["lineage"], "caption_source": config.seer}}
