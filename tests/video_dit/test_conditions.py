"""Given frames: they come back exactly, they matter, and what does not fit is said with the fix."""

from dataclasses import replace

import pytest
import torch
from random_pipeline import noise_u8, request

from video_dit import conditions
from video_dit.diffusion.held import LONE_SIGMA, REMADE_SIGMA
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.given_frames import encode_frames, given_latents
from video_dit.requests import Condition, Edit

FIELDS = {"prompt": "a red circle", "num_steps": 2}
IMAGE, LAST = noise_u8(1, seed=1)[0], noise_u8(1, seed=2)[0]
MODES = {  # name: request, frames in all, which of them are given
    "image": (conditions.image_to_video(IMAGE, 9, **FIELDS), 9, [0]),
    "first and last": (conditions.first_last(IMAGE, LAST, 9, **FIELDS), 9, [0, 8]),
    "forwards": (conditions.extend_forwards(noise_u8(5), 8, **FIELDS), 13, range(5)),
    "backwards": (conditions.extend_backwards(noise_u8(4), 9, **FIELDS), 13, range(9, 13)),
    "in between": (conditions.in_between(noise_u8(5), noise_u8(4, 1), 4, **FIELDS), 13, [*range(5), *range(9, 13)]),
    "loop": (conditions.loop(noise_u8(5), 8, **FIELDS), 13, range(5)),
    "loop of an image": (conditions.loop(noise_u8(1), 8, **FIELDS), 9, [0]),
    "edit": (conditions.edit(noise_u8(5), 0.6, **FIELDS), 5, []),
}


def assert_alike(video, other):
    """But for rounding: batches of other sizes add up in another order."""
    assert (video.int() - other.int()).abs().max() <= 1


def with_other_frames(asked):
    """The request with the last given frame changed."""
    if asked.edit:
        return replace(asked, edit=Edit(frames=255 - asked.edit.frames, sigma=asked.edit.sigma))
    *others, last = asked.conditions
    frames = torch.cat([last.frames[:-1], 255 - last.frames[-1:]])
    return replace(asked, conditions=(*others, Condition(frames=frames, start=last.start)))


@pytest.mark.parametrize("mode", MODES)
def test_given_frames_come_back_exactly_and_change_the_others(generator, mode):
    asked, num_frames, given = MODES[mode]
    (video,) = generator([asked])
    assert video.shape == (num_frames, 32, 48, 3)
    for condition in asked.conditions:
        assert torch.equal(video[condition.start : condition.stop], condition.frames)
    assert {place for c in asked.conditions for place in range(c.start, c.stop)} == set(given)
    made = [place for place in range(num_frames) if place not in set(given)]
    (other,) = generator([with_other_frames(asked)])
    assert all(not torch.equal(video[place], other[place]) for place in made)
    (free,) = generator([replace(asked, conditions=(), edit=None, loop=False)])
    assert not torch.equal(video[made], free[made])


def test_conditions_of_others_do_not_matter(generator):
    asked = [request(num_steps=2), request(num_steps=2, num_frames=1), *(mode for mode, _, _ in MODES.values())]
    for together, one in zip(generator(asked), asked, strict=True):
        assert_alike(together, generator([one])[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_given_frames(generator, sampler):
    asked = replace(MODES["in between"][0], sampler=sampler)
    (video,) = generator([asked])
    assert torch.equal(video[:5], asked.conditions[0].frames)
    assert torch.equal(video[9:], asked.conditions[1].frames)
    assert not torch.equal(video, generator([with_other_frames(asked)])[0])


def test_a_beginning_is_encoded_as_it_is(generator):
    video = noise_u8(9)
    latents, held_to = given_latents(generator.vae, request(num_frames=13, conditions=(Condition(frames=video),)))
    assert held_to[0, :, 0, 0].tolist() == [0, 0, 0, torch.inf]
    whole = torch.movedim(video.float() / 127.5 - 1, -1, 0)[None]  # b c t h w
    torch.testing.assert_close(latents[:, :3], generator.vae.encode(whole).mean[0])
    assert (latents[:, 3:] == 0).all()


def test_a_group_of_a_lone_frame_is_encoded_again_with_what_was_made_beside_it(generator):
    asked = conditions.first_last(IMAGE, LAST, 9, **FIELDS)
    made = noise_u8(9, seed=3)
    latents, held_to = given_latents(generator.vae, asked, made)
    assert held_to[0, :, 0, 0].tolist() == pytest.approx([0, torch.inf, REMADE_SIGMA])
    torch.testing.assert_close(latents[:, 2], encode_frames(generator.vae, made)[:, 2])
    first, _ = given_latents(generator.vae, asked)
    assert torch.equal(latents[:, 0], first[:, 0])  # given as it is, once and again


def test_only_videos_with_a_lone_frame_are_made_twice(generator):
    steps = {}
    for name in ("in between", "first and last", "loop of an image"):
        steps[name] = []
        generator([MODES[name][0]], on_step=lambda done, total, name=name: steps[name].append((done, total)))
    assert steps["in between"] == [(1, 2), (2, 2)]
    assert steps["first and last"] == steps["loop of an image"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    asked = [MODES["in between"][0], MODES["first and last"][0]]
    sizes = []

    def guide(denoise, packed):
        sizes.append(len(packed.lengths))
        return denoise

    for together, alone in zip(generator(asked, guide=guide), asked, strict=True):
        assert_alike(together, generator([alone])[0])
    assert sizes == [2, 2]  # a guide knows all of a batch's samples


def test_later_groups_are_encoded_behind_their_first_frame(generator):
    group, single = noise_u8(4), noise_u8(1, seed=1)
    given = (Condition(frames=group, start=5), Condition(frames=single, start=12))
    latents, held_to = given_latents(generator.vae, request(num_frames=13, conditions=given))
    assert held_to[0, :, 0, 0].tolist() == [torch.inf, torch.inf, 0, LONE_SIGMA]
    assert torch.equal(latents[:, 2:3], encode_frames(generator.vae, torch.cat([group[:1], group]))[:, 1:])
    still = encode_frames(generator.vae, single.expand(5, -1, -1, -1))
    assert torch.equal(latents[:, 3:], still[:, 1:])


def test_long_videos_are_encoded_in_chunks_with_the_same_numbers(generator, monkeypatch):
    video = noise_u8(21)
    whole = encode_frames(generator.vae, video)
    for num_pixels in (1, 9 * 32 * 48):
        monkeypatch.setattr("video_dit.given_frames.ENCODED_PIXELS", num_pixels)
        torch.testing.assert_close(encode_frames(generator.vae, video), whole, rtol=1e-4, atol=1e-5)


def test_a_loop_is_made_to_go_on_into_its_beginning(generator):
    asked = MODES["loop"][0]
    made = asked.sampled(4)
    assert (made.num_frames, made.loop) == (17, False)
    assert torch.equal(made.conditions[-1].frames, asked.conditions[0].frames[:4])
    assert torch.equal(generator([asked])[0], generator([made])[0][:13])


@pytest.mark.parametrize(
    ("given", "num_frames", "message"),
    [
        ([(4, 0)], 9, r"conditions\[0\].frames: 4 from frame 0 on, must be 1 \+ a multiple of 4: use 1 or 5"),
        ([(6, 3)], 9, r"conditions\[0\].frames: 6 from frame 3 on, must be a multiple of 4, or 1: use 4 or 8"),
        ([(3, 1)], 9, r"conditions\[0\].frames: 3 from frame 1 on, must be a multiple of 4, or 1: use 4"),
        ([(4, 3)], 9, r"conditions\[0\].start=3: a run of frames begins at 0 or 1 \+ a multiple of 4: use 1 or 5"),
        ([(1, 0), (4, 5), (1, 7)], 9, r"conditions\[2\]: conditions\[1\] gives some of the frames 5 to 8 too"),
        ([(5, 0), (4, 5)], 9, r"num_frames=9: all of them are given, must be more: at least one is made"),
        ([(1, 0)], 1, r"num_frames=1: all of them are given"),
        ([(5, 0)], 7, r"num_frames=7 is not 1 \+ a multiple of 4: use 5 or 9"),
    ],
)
def test_frames_that_do_not_fit_the_model_are_named_with_the_fix(generator, given, num_frames, message):
    asked = [Condition(frames=noise_u8(length), start=start) for length, start in given]
    with pytest.raises(ValueError, match=message):
        generator([request(num_frames=num_frames, conditions=asked)])


def test_frames_that_fit_no_model_are_named_at_once():
    with pytest.raises(ValueError, match=r"frames: torch.float32 \(5, 32, 48, 3\), must be a uint8 tensor t h w 3"):
        Condition(frames=noise_u8(5).float())
    with pytest.raises(ValueError, match=r"frames: torch.uint8 \(32, 48, 3\), must be .* an image is picture\[None\]"):
        Condition(frames=IMAGE)
    with pytest.raises(ValueError, match="frames: ndarray, must be a uint8 tensor"):
        Condition(frames=IMAGE.numpy())
    with pytest.raises(ValueError, match="start=-1: must be at least 0"):
        Condition(frames=noise_u8(1), start=-1)
    with pytest.raises(ValueError, match=r"conditions\[0\].frames: 1 frames of 32x48, must be of 32x64"):
        request(width_px=64, conditions=[Condition(frames=noise_u8(1))])
    with pytest.raises(ValueError, match=r"num_frames=5: conditions\[0\] gives frames 5 to 8, must be at least 9"):
        request(conditions=[Condition(frames=noise_u8(4), start=5)])
    with pytest.raises(ValueError, match=r"edit.frames: 9 frames of 32x48, must be 5 frames of 32x48"):
        request(edit=Edit(frames=noise_u8(9), sigma=0.5))
    with pytest.raises(ValueError, match=r"edit.sigma=0: must be above 0"):
        Edit(frames=noise_u8(5), sigma=0)
    with pytest.raises(ValueError, match=r"loop=True: conditions must give the frames from 0 on"):
        request(loop=True)
    with pytest.raises(ValueError, match=r"sampler='plms': known are ddpm, ddim, euler"):
        request(sampler="plms")
