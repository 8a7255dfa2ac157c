"""The exact judge of the toy world: from pixels alone, what a video shows, and whether that is what was asked for.

Each frame is measured by itself (background, colour, a soft mask of the object, its centre and area), then the frames
must agree: an attribute that changes on the way, or that more than one object makes ambiguous, is not recognised.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from pipeline import toy, toy_scenes
from pipeline.toy import Floats

AGREEMENT = 0.9  # share of the frames that must show the same
BACKGROUND_TOLERANCE = 50  # in each channel, of 255
NEAR_BACKGROUND = 60  # Euclidean, over the three channels
MIN_SATURATION = 60  # largest minus smallest channel; the palette has 140 and more, backgrounds 0
MIN_OBJECT_PX = 50  # the smallest object covers 128
BLURS_PX = (0.3, 1.0, 1.7)  # standard deviations: codecs and decoders soften edges
MIN_OVERLAP = 0.7  # intersection over union with the best template
SIZE_SLACK = 1.35  # an object may be so many times smaller than small or larger than large
SPEED_LIMITS_PX = (0.5, 1.45, 3.0)  # a frame, along the faster axis: still below the first, nothing above the last
MAX_OFF_PATH_PX = 1.5
AREA_SHARE = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of the bounding box
CENTROID_BELOW_MIDDLE = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6}  # of the height


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What a video shows, in the words of `toy_scenes.Scene`; None where nothing definite can be recognised.

    Attributes:
        direction: None in an image as well.
        speed: None in an image and when the object is still as well.
    """

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    background: str | None = None
    direction: str | None = None
    speed: str | None = None


@dataclasses.dataclass(frozen=True)
class Track:
    """The one object, frame by frame.

    Attributes:
        colours: t 3, RGB.
        mask: t h w in [0, 1].
        areas_px: t.
        centroids_px: t 2, row and column; pixel i spans i .. i + 1.
    """

    colours: Floats
    mask: Floats
    areas_px: Floats
    centroids_px: Floats


def measure(video_u8: NDArray[np.uint8]) -> Measured:
    """What the frames (t h w 3 uint8) show."""
    frames = video_u8.astype(np.float32)
    backgrounds = border_colours(frames)
    background = agreed([background_name(colour) for colour in backgrounds])
    track = find_object(frames, backgrounds)
    if track is None:
        return Measured(background=background)
    shape, size = fit_shape(track)
    direction, speed = fit_motion(track.centroids_px) if len(frames) > 1 else (None, None)
    return Measured(
        colour=agreed([colour_name(colour) for colour in track.colours]),
        shape=shape,
        size=size,
        background=background,
        direction=direction,
        speed=speed,
    )


def score(video_u8: NDArray[np.uint8], expected: str | toy_scenes.Scene) -> dict[str, bool]:
    """Whether the video (t h w 3 uint8) shows what a caption or scene states, by attribute and "all" together.

    Attributes the scene does not have are left out: motion in an image, speed of a still object.

    Raises:
        ValueError: the caption does not state a toy scene.
    """
    scene = toy_scenes.parse_caption(expected) if isinstance(expected, str) else expected
    measured = measure(video_u8)
    stated = {name: getattr(scene, name) for name in toy_scenes.ATTRIBUTES if getattr(scene, name) is not None}
    row = {name: getattr(measured, name) == value for name, value in stated.items()}
    return {**row, "all": all(row.values())}


def score_table(rows: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """The share right of each attribute, among the rows that have it, and of all together.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows=[], must hold at least one score")
    table = {}
    for name in (*toy_scenes.ATTRIBUTES, "all"):
        verdicts = [row[name] for row in rows if name in row]
        if verdicts:
            table[name] = sum(verdicts) / len(verdicts)
    return table


def agreed(names: Sequence[str | None]) -> str | None:
    """The name that (nearly) all frames have."""
    name, count = Counter(names).most_common(1)[0]
    return name if count >= AGREEMENT * len(names) else None


def border_colours(frames: Floats) -> Floats:
    """Median colour of the outermost pixels, t h w 3 -> t 3; not finite where the border is no plain area."""
    border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, 1:-1, 0], frames[:, 1:-1, -1]], axis=1)  # t n 3
    median = np.median(border, axis=1)
    plain = np.linalg.norm(border - median[:, None], axis=-1) < NEAR_BACKGROUND
    return np.where(plain.mean(1)[:, None] > 0.6, median, np.nan)


def background_name(colour: Floats) -> str | None:
    """The nearest background, if it is near."""
    errors = {name: float(np.abs(colour - np.array(rgb)).max()) for name, rgb in toy_scenes.BACKGROUNDS.items()}
    name = min(errors, key=lambda name: errors[name])
    return name if errors[name] <= BACKGROUND_TOLERANCE else None


def hue_degrees(colour: Floats | tuple[int, int, int]) -> float:
    """Angle around the gray axis: red 0, green 120, blue 240."""
    red, green, blue = (float(channel) for channel in colour)
    return float(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360)


def colour_name(colour: Floats) -> str:
    """The colour of the nearest hue; the palette's lie 60 degrees apart."""
    hue = hue_degrees(colour)
    return min(
        toy_scenes.COLOURS, key=lambda name: abs((hue - hue_degrees(toy_scenes.COLOURS[name]) + 180) % 360 - 180)
    )


def find_object(frames: Floats, backgrounds: Floats) -> Track | None:
    """The one saturated object that is there in every frame; None when there is none, or more than one.

    Args:
        frames: t h w 3.
        backgrounds: t 3.
    """
    deviation = frames - rearrange(backgrounds, "t c -> t 1 1 c")
    saturation = frames.max(-1) - frames.min(-1)  # t h w
    coloured = saturation > MIN_SATURATION
    counts = coloured.sum((1, 2))
    if not np.all(np.isfinite(backgrounds)) or counts.min() < MIN_OBJECT_PX:
        return None
    level = (saturation * coloured).sum((1, 2)) / counts
    core = coloured & (saturation >= rearrange(level, "t -> t 1 1"))  # without the soft edge
    colours = np.einsum("thwc,thw->tc", frames, core) / core.sum((1, 2))[:, None]
    axes = colours - backgrounds
    contrast = (axes**2).sum(1)
    if contrast.min() < NEAR_BACKGROUND**2:
        return None
    share = np.einsum("thwc,tc->thw", deviation, axes) / rearrange(contrast, "t -> t 1 1")
    mask = sharpen(share)
    rough_areas_px = mask.sum((1, 2))
    rows = np.einsum("thw,h->t", mask, np.arange(mask.shape[1]) + 0.5) / rough_areas_px
    columns = np.einsum("thw,w->t", mask, np.arange(mask.shape[2]) + 0.5) / rough_areas_px
    near = within(rows, columns, np.sqrt(rough_areas_px) + 3, mask.shape[1:])
    strays = ((np.linalg.norm(deviation, axis=-1) > NEAR_BACKGROUND) & ~near).sum((1, 2))
    areas_px = (share * near).sum((1, 2))  # not the mask's: neither blur nor noise changes the sum of the shares
    if np.mean(strays <= np.maximum(6, 0.05 * areas_px)) < AGREEMENT or areas_px.min() < MIN_OBJECT_PX:
        return None
    return Track(colours, mask, areas_px, np.stack([rows, columns], axis=1))


def sharpen(share: Floats) -> Floats:
    """The object's share of each pixel as a mask in [0, 1], with a dead zone at either end against noise."""
    return np.clip((share - 0.5) / 0.6 + 0.5, 0, 1)


def within(rows: Floats, columns: Floats, reach_px: Floats, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels (t h w) of the square around each frame's centroid.

    Every shape lies within the square root of its area around its centroid.
    """
    near_y = np.abs(np.arange(size[0]) + 0.5 - rows[:, None]) <= reach_px[:, None]  # t h
    near_x = np.abs(np.arange(size[1]) + 0.5 - columns[:, None]) <= reach_px[:, None]  # t w
    return rearrange(near_y, "t h -> t h 1") & rearrange(near_x, "t w -> t 1 w")


def fit_shape(track: Track) -> tuple[str | None, str | None]:
    """Shape and size by synthesis: each shape is drawn with the measured centroid and area and compared with the mask.

    The beginning, the middle and the end must each look enough like one and the same shape and size.
    """
    across_px = {shape: np.sqrt(track.areas_px / area_share) for shape, area_share in AREA_SHARE.items()}
    overlaps = {shape: overlap(track, shape, across_px[shape]) for shape in AREA_SHARE}
    shapes, sizes = set(), set()
    for part in np.array_split(np.arange(len(track.mask)), min(3, len(track.mask))):
        fit = {shape: float(overlaps[shape][:, part].mean(1).max()) for shape in overlaps}
        shape = max(fit, key=lambda shape: fit[shape])
        found = fit[shape] >= MIN_OVERLAP
        shapes.add(shape if found else None)
        sizes.add(size_name(float(np.median(across_px[shape][part]))) if found else None)
    return (shapes.pop() if len(shapes) == 1 else None), (sizes.pop() if len(sizes) == 1 else None)


def overlap(track: Track, shape: str, across_px: Floats) -> Floats:
    """Intersection over union of the mask with a shape as soft as each of BLURS_PX makes it, blur t."""
    middles_px = track.centroids_px - np.outer(across_px, [CENTROID_BELOW_MIDDLE[shape], 0])
    sharp = toy.coverage(shape, across_px, middles_px, *track.mask.shape[1:])
    found = []
    for blur_px in BLURS_PX:
        rows, columns = (blurring(size, blur_px) for size in sharp.shape[1:])
        template = sharpen(rows @ sharp @ columns.T)
        union = np.maximum(track.mask, template).sum((1, 2))
        found.append(np.minimum(track.mask, template).sum((1, 2)) / union)
    return np.stack(found)


def blurring(size: int, blur_px: float) -> Floats:
    """Gaussian blur of a row of pixels, as a matrix."""
    offsets = np.arange(size) - np.arange(size)[:, None]
    weights = np.exp(-0.5 * (offsets / blur_px) ** 2)
    return weights / weights.sum(1, keepdims=True)


def size_name(across_px: float) -> str | None:
    """The size class of an object so many pixels across."""
    small_px, large_px = toy_scenes.SIZES_PX["small"], toy_scenes.SIZES_PX["large"]
    if not small_px / SIZE_SLACK <= across_px < large_px * SIZE_SLACK:
        return None
    return "small" if across_px < (small_px * large_px) ** 0.5 else "large"


def fit_motion(centroids_px: Floats) -> tuple[str | None, str | None]:
    """Direction and speed of a straight, even path through the centroids (t 2), by the median of all pairwise slopes.

    Source: Theil-Sen estimator (Sen, 1968).
    """
    steps = np.arange(len(centroids_px))
    later, earlier = np.tril_indices(len(steps), -1)
    slopes = (centroids_px[later] - centroids_px[earlier]) / (later - earlier)[:, None]
    velocity_px = np.median(slopes, axis=0)
    path = centroids_px - steps[:, None] * velocity_px
    off_path_px = np.linalg.norm(path - np.median(path, axis=0), axis=1)
    speed_px = float(np.abs(velocity_px).max())
    still, slow, fast = SPEED_LIMITS_PX
    if np.mean(off_path_px <= MAX_OFF_PATH_PX) < AGREEMENT or speed_px > fast:
        return None, None
    if speed_px < still:
        return "still", None
    units = {name: np.array(step) / np.hypot(*step) for name, step in toy_scenes.DIRECTIONS.items() if name != "still"}
    direction = max(units, key=lambda name: float(units[name] @ velocity_px))
    return direction, "slow" if speed_px < slow else "fast"
