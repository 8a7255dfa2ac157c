"""A world of one process, for tests of what is done to a model before there is anybody to talk to."""

import pytest
import torch.distributed as dist

from video_dit.parallel.world import DistributedWorld


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DistributedWorld("cpu")
    dist.destroy_process_group()
