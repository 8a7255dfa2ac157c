"""What a clip looks like in 256 bits: near copies differ in few of them, whatever their size and codec."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.stages.score import luma_of
from pipeline.stages.window import Video

NUM_FRAMES = 4
BITS_PER_FRAME = 64
_SIDE_PX = 32
_FLAT = 2.0  # standard deviation of luma, of 255: below it the hash would be of noise


def fingerprint(video_u8: Video) -> bytes | None:
    """A perceptual hash of a clip (t h w 3): 64 bits of each of four frames spread over it, 32 bytes.

    The hash of a frame is the sign of its 64 lowest cosine coefficients, without the mean, against their median
    (pHash: Zauner 2010, section 3.2.1). A clip with a flat frame, such as a black one, has none: None.
    """
    chosen = np.linspace(0, len(video_u8) - 1, NUM_FRAMES).round().astype(int)
    bits = []
    for frame in video_u8[chosen]:
        luma = luma_of(frame)
        if luma.std() < _FLAT:
            return None
        small = cv2.resize(luma, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
        low = cv2.dct(small)[:9, :8].ravel()[1:][:BITS_PER_FRAME]
        bits.append(low > np.median(low))
    return np.packbits(np.concatenate(bits)).tobytes()
