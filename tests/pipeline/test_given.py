"""Files to frames at their places in requests: counts, rates, sizes, and errors that name the flag."""

import numpy as np
import pytest
import torch
from random_pipeline import noise_u8, request

from pipeline import media
from pipeline.errors import SourceError
from pipeline.given import GivenConfig
from pipeline.request_files import from_json, no_files, to_json
from video_dit.requests import Condition, Edit, GenerationRequest, Limits
from video_dit.shapes import Stride

LIMITS = Limits(stride=Stride(4, 16, 16), fps=8.0)


def levels(num_frames, height_px=32, width_px=48):
    """A video of gray frames, each 5 levels lighter."""
    steps = np.arange(num_frames, dtype=np.uint8) * 5 + 20
    return np.broadcast_to(steps[:, None, None, None], (num_frames, height_px, width_px, 3)).copy()


def steps_of(frames):
    """Which frames of `levels` these are."""
    return ((frames.float().mean(dim=(1, 2, 3)) - 20) / 5).round().int().tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image, and a clip of 22 frames at the model's rate and one at twice that."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "image.png").write_bytes(media.encode_png(noise_u8(1)[0].numpy()))
    (folder / "clip.mp4").write_bytes(media.encode_mp4(levels(22), 8.0))
    (folder / "fast.mp4").write_bytes(media.encode_mp4(levels(22), 16.0))
    (folder / "notes.mp4").write_text("not a video")
    return {path.stem: str(path) for path in folder.iterdir()}


def put(config, num_frames=33, **changes):
    (asked,) = config.put_into([request(num_frames=num_frames, **changes)], LIMITS)
    LIMITS.check(asked)
    return asked


def test_an_image_comes_as_it_is(files):
    asked = put(GivenConfig(begin=files["image"], end=files["image"]), num_frames=9)
    assert [given.start for given in asked.conditions] == [0, 8]
    assert all(torch.equal(given.frames, noise_u8(1)) for given in asked.conditions)


@pytest.mark.parametrize(
    ("fields", "starts", "taken"),
    [
        ({"begin": "clip"}, [0], [range(1, 22)]),  # 21 = 1 + 5 groups: the last ones
        ({"end": "clip"}, [13], [range(20)]),  # 5 groups: the first ones
        ({"begin": "clip", "max_given_frames": 10}, [0], [range(13, 22)]),
        ({"begin": "clip", "end": "clip", "max_given_frames": 8}, [0, 25], [range(17, 22), range(8)]),
        ({"end": "clip", "max_given_frames": 1}, [32], [range(1)]),
        ({"loop": "clip"}, [0], [range(1, 22)]),
        ({"begin": "fast"}, [0], [range(4, 22, 2)]),  # 11 frames at 8 fps, of which 9
    ],
)
def test_the_frames_next_to_the_new_ones_are_taken_at_the_models_rate(files, fields, starts, taken):
    named = {name: files.get(value, value) for name, value in fields.items()}
    asked = put(GivenConfig(**named))
    assert [given.start for given in asked.conditions] == starts
    assert [steps_of(given.frames) for given in asked.conditions] == [list(steps) for steps in taken]
    assert asked.loop == ("loop" in fields)


def test_an_edit_takes_as_many_frames_as_are_asked_for(files):
    asked = put(GivenConfig(edit=files["clip"], strength=0.4), num_frames=9)
    assert steps_of(asked.edit.frames) == list(range(9))
    assert asked.edit.sigma == 0.4
    assert asked.conditions == ()


def test_other_sizes_are_scaled_and_cut_around_the_middle(tmp_path):
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 48:144] = 200  # the middle 96 of 192 columns: 3:2, as asked for
    (tmp_path / "wide.png").write_bytes(media.encode_png(wide))
    asked = put(GivenConfig(begin=str(tmp_path / "wide.png")))
    frames = asked.conditions[0].frames
    assert frames.shape == (1, 32, 48, 3)
    assert (frames[:, :, 2:-2] == 200).all()


def test_what_cannot_be_used_names_the_field(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="end=nothing.png: no such file"):
        GivenConfig(end="nothing.png").check_files()
    with pytest.raises(SourceError, match="begin=.*notes.mp4: unreadable"):
        put(GivenConfig(begin=files["notes"]))
    with pytest.raises(
        ValueError, match=r"num_frames=21: begin=.*: 22 frames at 8 fps, of which 21 are given; must be"
    ):
        put(GivenConfig(begin=files["clip"]), num_frames=21)
    with pytest.raises(
        ValueError, match=r"end=.*: 22 frames at 8 fps, of which 3 are to be taken: an end must be 1, or 4"
    ):
        put(GivenConfig(end=files["clip"], max_given_frames=3))
    with pytest.raises(ValueError, match=r"num_frames=33: edit=.*: 22 frames at 8 fps, so that at most as many"):
        put(GivenConfig(edit=files["clip"]))
    with pytest.raises(ValueError, match="give begin, end or both, or one of the others alone"):
        GivenConfig(begin="a.png", loop="b.mp4")
    with pytest.raises(ValueError, match="strength=0"):
        GivenConfig(strength=0)
    with pytest.raises(ValueError, match="max_given_frames=0"):
        GivenConfig(max_given_frames=0)


def test_requests_go_through_json_with_their_frames_in_files():
    conditions = (Condition(frames=noise_u8(1)), Condition(frames=noise_u8(1), start=8))
    asked = request(num_frames=9, conditions=conditions, edit=Edit(frames=noise_u8(9, 1), sigma=0.5), sampler="heun")
    fields, files = to_json(asked)
    assert len(files) == 2  # the two images are one file
    assert [values["start"] for values in fields["conditions"]] == [0, 8]
    back = from_json(fields, files.__getitem__)
    assert to_json(back) == (fields, files)
    assert torch.equal(back.edit.frames, asked.edit.frames)
    plain = request(loop=False)
    assert from_json(to_json(plain)[0], {}.__getitem__) == plain


def test_requests_of_older_versions_are_read():
    fields = {"prompt": "a red circle", "height_px": 32, "width_px": 48, "num_frames": 5, "num_steps": 3}
    assert from_json(fields, no_files) == GenerationRequest(**fields)
    assert from_json(to_json(GenerationRequest(**fields))[0], no_files) == GenerationRequest(**fields)
