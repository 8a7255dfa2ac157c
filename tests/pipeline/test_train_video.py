"""What a training run of the transformer refuses before any work."""

import pytest

from pipeline.train_video import TrainVideoConfig
from video_dit.diffusion.losses import DiffusionConfig


@pytest.mark.parametrize(
    "fields", [{"schedule_name": "linear", "target": "v"}, {"target": "data"}, {"base_tokens": 256}], ids=str
)
def test_what_a_model_folder_could_not_tell_is_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"diffusion.{name}={value!r}: must be"):
        TrainVideoConfig(diffusion=DiffusionConfig(**fields))
    assert TrainVideoConfig(diffusion=DiffusionConfig(shift=3.0)).diffusion.shift == 3.0
