"""A model without weights: a video is a function of the seed. Stands where `ServeConfig.generator` points.

The prompt steers it: "slow" takes a tenth of a second a step, "bad" is refused, "broken" raises, "huge" has no memory.
"""

import time

import torch

from video_dit.generator import Limits
from video_dit.shapes import Stride

LIMITS = Limits(stride=Stride(4, 16, 16), fps=8.0)


def read_limits(url):
    return LIMITS


def frames(request):
    """t h w 3: one gray level a frame, moved by the seed."""
    levels = (torch.arange(request.num_frames) * 10 + request.seed) % 256
    return levels.to(torch.uint8)[:, None, None, None].expand(*request.shape, 3).contiguous()


class Generator:
    limits = LIMITS

    @classmethod
    def from_pretrained(cls, url, device="cpu"):
        return cls()

    def __call__(self, requests, on_step=None):
        for request in requests:
            if request.prompt in FAULTS:
                raise FAULTS[request.prompt]
        num_steps = requests[0].num_steps
        for step in range(num_steps):
            if "slow" in requests[0].prompt:
                time.sleep(0.1)
            if on_step:
                on_step(step + 1, num_steps)
        return [frames(request) for request in requests]


FAULTS = {
    "bad": ValueError("num_frames=3 is not 1 + a multiple of 4"),
    "broken": RuntimeError("shapes do not match"),
    "huge": torch.OutOfMemoryError("out of memory"),
}
