"""Metrics of a run: one JSON line a step, and the same as TensorBoard scalars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from pipeline import media

TRAIN_LOG = "train.jsonl"


class MetricsLog:
    """Appends to `folder/train.jsonl` and to TensorBoard event files in `folder`.

    A resumed run goes on where its checkpoint stands: lines of later steps are dropped, they will be run again.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / TRAIN_LOG
        kept = [line for line in _lines(path) if json.loads(line)["step"] < start_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)

    def write(self, metrics: dict[str, float]) -> None:
        """Log a step; `metrics` has its number as "step"."""
        self._file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, int(metrics["step"]))

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def log_scalars(folder: Path, group: str, step: int, values: Mapping[str, float]) -> None:
    """Numbers of a step beside those of the steps themselves, as "group/name"."""
    with SummaryWriter(str(folder)) as board:
        for name, value in values.items():
            board.add_scalar(f"{group}/{name}", value, step)


def log_videos(folder: Path, step: int, videos_u8: dict[str, media.Frames], fps: float) -> None:
    """Show videos in TensorBoard's image tab, as GIFs that play there; t h w 3 by tag."""
    with SummaryWriter(str(folder)) as board:
        for tag, video_u8 in videos_u8.items():
            _, height_px, width_px, _ = video_u8.shape
            gif = media.encode_gif(video_u8, fps)
            image = Summary.Image(height=height_px, width=width_px, colorspace=3, encoded_image_string=gif)
            assert board.file_writer is not None
            board.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _lines(path: Path) -> list[str]:
    """The complete lines of a file; a line that a kill cut short is not one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line]
