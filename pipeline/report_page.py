"""A published result as one HTML page that needs nothing else: counts, rejects, histograms, thumbnails, lineage."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from pipeline import report as figures
from pipeline import store
from pipeline.errors import ClipRejected
from pipeline.stages.reader import ClipReader

PAGE = "report.html"
THUMBNAIL_PX = 120  # height of a frame
TIME_LIMIT_S = 60.0  # for all thumbnails of one kind
_CLIP_TIME_LIMIT_S = 5.0
_RATES = {"clips_per_s": "clips/s", "frames_per_s": "frames/s", "sources_per_s": "sources/s", "elapsed_s": "seconds"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A clip on the page.

    Attributes:
        text: its caption, or what it is.
        why: the reason to refuse it, or empty.
        image: base64 of a JPEG of its first, middle and last frame, or empty.
        missing: why there is no image.
    """

    text: str
    why: str = ""
    image: str = ""
    missing: str = ""


def write_page(manifest: store.Manifest, num_thumbnails: int = 24, url: str | None = None) -> str:
    """Write the page of a result; returns its URL.

    Args:
        manifest: of any published result.
        num_thumbnails: at most so many clips that are kept, and as many that were refused.
        url: where to; None is `report.html` in the result's folder.
    """
    url = url or store.join(manifest.uri, PAGE)
    store.write_bytes(url, page(figures.make_report(manifest), num_thumbnails).encode())
    return url


def page(report: figures.Report, num_thumbnails: int) -> str:
    """The page's HTML."""
    template = Path(__file__).with_name("report_page.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = _figure
    manifest = report.manifest
    kept = figures.kept_table(manifest)
    with ClipReader(timeout_s=_CLIP_TIME_LIMIT_S) as reader:
        kept_clips = _thumbnails(reader, _kept_rows(manifest, num_thumbnails))
        refused_clips = _thumbnails(reader, _refused_rows(manifest, num_thumbnails))
    return environment.from_string(template).render(
        report=report,
        rates=[(text, _figure(report.measures[name])) for name, text in _RATES.items() if name in report.measures],
        kept=kept,
        num_kept=manifest.counts.get(kept, 0),
        num_rejects=manifest.counts.get("rejects", 0),
        kept_clips=kept_clips,
        refused_clips=refused_clips,
        config=json.dumps(manifest.config, indent=2),
    )


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


# --- thumbnails -----------------------------------------------------------------------------------------------------


def _kept_rows(manifest: store.Manifest, num: int) -> list[figures.Row]:
    if figures.kept_table(manifest) == "clips":
        return figures.spread(manifest, "clips", num)
    if figures.kept_table(manifest) == "latents":
        ids = [row["clip_id"] for row in figures.spread(manifest, "latents", num, ["clip_id"])]
        return _find_clips(manifest, ids)
    return []


def _refused_rows(manifest: store.Manifest, num: int) -> list[figures.Row]:
    """Rows with source_uri, and window where it is known, of rejects spread over the table."""
    rejects = figures.spread(manifest, "rejects", num)
    clips = {row["clip_id"]: row for row in _find_clips(manifest, [row["what"] for row in rejects])}
    return [
        {"source_uri": row["what"], **clips.get(row["what"], {}), "why": row["reason"], "detail": row["detail"]}
        for row in rejects
    ]


def _find_clips(manifest: store.Manifest, ids: list[str]) -> list[figures.Row]:
    """What is known of clips, in the order of the ids: from OUTCOMES, or the CLIPS that were encoded."""
    home, table = manifest, "outcomes"
    if manifest.verb == "encode":
        home, table = store.Manifest.load(manifest.parents[0]["uri"]), "clips"
    columns = ["clip_id", "source_uri", "start_s", "end_s", "num_frames", "height_px", "width_px", "fps", "caption"]
    wanted = set(ids)
    found: dict[str, figures.Row] = {}
    for part in figures.shards(home, table, columns):
        found |= {row["clip_id"]: row for row in part.to_pylist() if row["clip_id"] in wanted}
    return [found[clip_id] for clip_id in ids if clip_id in found]


def _thumbnails(reader: ClipReader, rows: list[figures.Row]) -> list[Thumbnail]:
    until_s = time.monotonic() + TIME_LIMIT_S
    return [_thumbnail(reader, row, late=time.monotonic() > until_s) for row in rows]


def _thumbnail(reader: ClipReader, row: figures.Row, late: bool) -> Thumbnail:
    if "why" in row:
        name = row["source_uri"].rsplit("/", 1)[-1]
        about = {"text": name if row["detail"].startswith(row["source_uri"]) else f"{name}: {row['detail']}"}
        about["why"] = row["why"]
    else:
        shape = f"{row['num_frames']} frames, {row['height_px']} x {row['width_px']}"
        about = {"text": f"{row['caption'] or 'no caption'} ({shape})"}
    if late:
        return Thumbnail(**about, missing="no time left to look at it")
    try:
        return Thumbnail(**about, image=_strip(reader, row))
    except ClipRejected as verdict:
        return Thumbnail(**about, missing=f"no picture: {verdict}")


def _strip(reader: ClipReader, row: figures.Row) -> str:
    """First, middle and last frame of a window, or of the file's first half second."""
    if row.get("end_s") is None:
        facts = reader.probe(row["source_uri"])
        end_s = max(facts.start_s + 0.5, facts.start_s + 1 / (facts.fps or 1))
        size = _fit(facts.height_px, facts.width_px)
        clip = reader.read(row["source_uri"], facts.start_s, end_s, height_px=size[0], width_px=size[1])
    else:
        size = _fit(row["height_px"], row["width_px"])
        window: dict[str, Any] = {name: row[name] for name in ("start_s", "end_s", "fps", "num_frames")}
        clip = reader.read(row["source_uri"], **window, height_px=size[0], width_px=size[1])
    last = len(clip.video_u8) - 1
    frames = clip.video_u8[sorted({0, last // 2, last})]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(file, "JPEG", quality=82)
    return base64.b64encode(file.getvalue()).decode()


def _fit(height_px: int, width_px: int) -> tuple[int, int]:
    scale = THUMBNAIL_PX / height_px
    return THUMBNAIL_PX, min(3 * THUMBNAIL_PX, max(16, round(width_px * scale)))
