"""Long videos: windows that cover them, overlap, keep what is given, and depend on nothing else."""

from dataclasses import replace

import pytest
import torch
from random_pipeline import noise_u8, request

from video_dit import conditions
from video_dit.long_videos import Window, long_videos, plan_windows
from video_dit.requests import Condition

FIELDS = {"prompt": "a red circle", "num_steps": 2}


def make(generator, *requests, window=9, overlap=5, **options):
    return long_videos(generator, requests, window, overlap, **options)


def test_windows_cover_the_video_and_overlap():
    assert plan_windows(request(num_frames=9), 9, 5, 4) == [Window(0, 9, 0)]
    assert plan_windows(request(num_frames=21), 9, 5, 4) == [
        Window(0, 9, 0),
        Window(4, 13, 9),
        Window(8, 17, 13),
        Window(12, 21, 17),
    ]
    of_even_lengths = plan_windows(request(num_frames=81), 49, 9, 4)
    assert of_even_lengths == [Window(0, 49, 0), Window(40, 81, 49)]
    assert [w.stop - w.known for w in plan_windows(request(num_frames=113), 49, 9, 4)] == [49, 32, 32]


def test_windows_go_on_from_given_frames_and_skip_them():
    first = conditions.extend_forwards(noise_u8(21), 8, **FIELDS)
    assert plan_windows(first, 13, 5, 4) == [Window(16, 29, 21)]
    both = conditions.in_between(noise_u8(9), noise_u8(20), 8, **FIELDS)
    assert plan_windows(both, 13, 5, 4) == [Window(4, 13, 9), Window(8, 21, 13)]  # it sees where it leads
    assert plan_windows(both, 17, 5, 4) == [Window(4, 21, 9)]
    to_an_image = conditions.first_last(noise_u8(1)[0], noise_u8(1)[0], 17, **FIELDS)
    assert plan_windows(to_an_image, 13, 5, 4) == [Window(0, 9, 1), Window(4, 17, 9)]


def test_a_window_goes_on_from_the_one_before(generator):
    asked = request(num_frames=17, num_steps=2, seed=3)
    (video,) = make(generator, asked)
    assert video.shape == (17, 32, 48, 3)
    (first,) = generator([replace(asked, num_frames=9)])
    assert torch.equal(video[:9], first)
    tail = Condition(frames=first[4:])
    (second,) = generator([replace(asked, num_frames=9, conditions=(tail,), seed=3 + 1_000_003)])
    assert torch.equal(video[4:13], second)
    assert torch.equal(video[4:9], first[4:])


def test_what_is_given_stays_wherever_windows_begin(generator):
    first, second = noise_u8(9), noise_u8(12, seed=1)
    (video,) = make(generator, conditions.in_between(first, second, 16, **FIELDS))
    assert video.shape[0] == 37
    assert torch.equal(video[:9], first)
    assert torch.equal(video[25:], second)
    (video,) = make(generator, conditions.first_last(first[0], second[0], 25, **FIELDS), window=13)
    assert torch.equal(video[[0, 24]], torch.stack([first[0], second[0]]))
    (video,) = make(generator, conditions.loop(first, 16, **FIELDS), window=17)
    assert video.shape[0] == 25
    assert torch.equal(video[:9], first)


def test_a_long_video_does_not_depend_on_its_batch(generator):
    asked = [
        request(num_frames=17, num_steps=2),
        request(num_frames=5, num_steps=2),
        conditions.edit(noise_u8(13), 0.5, **FIELDS),
    ]
    for together, one in zip(make(generator, *asked), asked, strict=True):
        difference = together.int() - make(generator, one)[0].int()
        assert difference.abs().max() <= 1  # rounding
    assert torch.equal(make(generator, asked[1])[0], generator([asked[1]])[0])


def test_a_long_edit_takes_each_window_from_the_video(generator):
    frames = noise_u8(17)
    (video,) = make(generator, conditions.edit(frames, 0.5, **FIELDS))
    late = torch.cat([frames[:13], 255 - frames[13:]])
    (other,) = make(generator, conditions.edit(late, 0.5, **FIELDS))
    assert torch.equal(video[:13], other[:13])
    assert not torch.equal(video[13:], other[13:])


def test_progress_runs_over_all_windows(generator):
    told = []
    make(generator, request(num_frames=17, num_steps=2), on_step=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_what_does_not_fit_is_said_before_any_work(generator):
    for window, overlap, message in (
        (10, 5, r"window_frames=10: must be 1 \+ a multiple of 4: use 9 or 13"),
        (9, 0, r"overlap_frames=0: must be 1 \+ a multiple of 4: use 1 or 5"),
        (9, 9, "overlap_frames=9: must be less than window_frames=9"),
    ):
        with pytest.raises(ValueError, match=message):
            make(generator, request(num_frames=17), window=window, overlap=overlap)
    with pytest.raises(ValueError, match="num_frames=18 is not"):
        make(generator, request(num_frames=18))
    still = conditions.first_last(noise_u8(1)[0], noise_u8(1)[0], 13, **FIELDS)
    with pytest.raises(ValueError, match="all of them are given"):
        make(generator, still, on_step=lambda done, total: pytest.fail("it has begun"))
