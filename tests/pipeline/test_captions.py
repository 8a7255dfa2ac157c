"""Captions: what stands in for a missing one, what of an answer is a caption, and the order of many at once."""

import dataclasses
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import caption, guard, probe
from pipeline.stages.caption import CaptionConfig, caption_clip, caption_rows
from pipeline.stages.caption_answer import Answer, accept
from pipeline.stages.files import member_uri
from pipeline.stages.window import Clip

LIMITS = {"min_words": 2, "max_words": 8}
SEEN = {"fallback": "endpoint", "url": "http://h:8000/v1", "model": "m"}


def source(**changes):
    sizes = {"height_px": 64, "width_px": 64, "pixel_aspect": 1.0, "rotation_deg": 0, "num_frames": 17}
    facts = probe.Probe(source_id="s", codec="h264", fps=8.0, start_s=0.0, end_s=17 / 8, **sizes)
    return {"source_uri": "/cars/red_car-1.mp4", "caption": None, "caption_source": None, "probe": facts, **changes}


def window(**changes):
    lineage = {"source_id": "s", "caption_source": None}
    times = {"start_s": 1.0, "end_s": 2.5, "fps": 8.0, "num_frames": 12}
    return {**source(), **times, "lineage": lineage, "reject_reason": None, **changes}


def no_read(*_, **__):
    raise AssertionError("nothing is to be read")


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fallback": "guess"}, "fallback='guess': must be one of"),
        ({"template": "{stem} {colour}"}, r"\['colour'\] must be among .*'stem_words'"),
        ({"template": "{}"}, r"\[''\] must be among"),
        ({"template": "{stem.__class__}"}, "must be among"),
        ({"recaption": True}, "recaption=True: fallback='filename' must be"),
        ({**SEEN, "model": None}, "model=None"),
        ({"fallback": "model"}, "model=None"),
        ({**SEEN, "url": None}, "url=None: must be an http"),
        ({**SEEN, "url": "ftp://h/v1"}, "url='ftp://h/v1': must be an http"),
        ({**SEEN, "url": "file:///etc/passwd"}, "must be an http"),
        ({**SEEN, "url": "localhost:8000/v1"}, "must be an http"),
        ({**SEEN, "url": "http://h:x/v1"}, "must be an http"),
        ({**SEEN, "url": "http://me:secret@h/v1"}, "url of h: must have no user"),
        ({**SEEN, "url": "http://h/v1?key=secret"}, "url of h: must have no user"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"num_tries": 0}, "num_tries=0"),
        ({"min_words": 9, "max_words": 8}, "max_words=8: must be at least min_words=9"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        CaptionConfig(**changes)
    assert "secret" not in str(error.value)


# --- of sources -----------------------------------------------------------------------------------------------------


def test_templates():
    def fill(template, uri, given=None):
        return caption.fill_template(template, uri, given)

    assert fill(caption.TEMPLATE, "s3://b/sea_side/red_car-0042.mp4") == "a video of sea side, red car"
    assert fill("{folder} / {stem}", "/x/sea_side/red_car-0042.mp4") == "sea_side / red_car-0042"
    assert fill("sks, {caption}", "/x/a.mp4", "a dog\nruns") == "sks, a dog runs"
    assert fill(caption.TEMPLATE, "/cars/0042.mp4") == "a video of cars"
    assert fill("{stem}", "/x/{folder}.mp4") == "{folder}"  # names are not filled again
    member = member_uri("s3://b/shard_3.tar", 512, 100, "red_car.mp4")
    assert fill("{folder}: {stem_words}", member) == "shard_3: red car"
    assert caption.filename_words(member) == "red car"
    assert fill("{folder}", member_uri("/b/shard.tar", 512, 100, "dogs/1.mp4")) == "dogs"


@pytest.mark.parametrize(
    ("before", "settings", "text", "origin"),
    [
        (None, {"fallback": "template"}, "a video of cars, red car", "template"),
        (None, {"fallback": "template", "template": "{caption}"}, "", "empty"),
        ("given", {"fallback": "template"}, "given", "sidecar"),
        ("given", {"fallback": "template", "template": "sks {caption}", "recaption": True}, "sks given", "template"),
        (None, {"fallback": "endpoint"}, None, None),
        ("given", {"fallback": "endpoint"}, "given", "sidecar"),
        ("given", {"fallback": "model", "recaption": True}, "given", "sidecar"),  # until a clip's frames are seen
    ],
)
def test_captions_of_sources(before, settings, text, origin):
    after = caption.caption(source(caption=before, caption_source=before and "sidecar"), **settings)
    assert (after["caption"], after["lineage"]["caption_source"]) == (text, origin)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("A red car turns left.", "A red car turns left."),
        ("  A red car\n\nturns\tleft. ", "A red car turns left."),
        ('"A red car turns left."', "A red car turns left."),
        ("\u201cA red car.\u201d", "A red car."),
        ('"Stop" and "Go" signs.', '"Stop" and "Go" signs.'),
        ("<think>A car? No.</think>\n\nA red car.", "A red car."),
        ("The user wants a caption.</think>A red car.", "A red car."),  # where the prompt's template opens it
        ("Caption: A red car.", "A red car."),
        ("**Caption:** A red car.", "A red car."),
        ("**Caption**: A red car.", "A red car."),
        ('Sure! Here\'s a caption for the video:\n\n"A red car."', "A red car."),
        ("Here is a caption of about 60 words: A red car.", "A red car."),
        ("A sign with the caption: halt.", "A sign with the caption: halt."),
        ("Here is a dog: it runs.", "Here is a dog: it runs."),
        ("A red\x00 car \ud800drives.", "A red car drives."),
        ("Un caf\u00e9 \u00e0 Paris.", "Un caf\u00e9 \u00e0 Paris."),
    ],
)
def test_a_caption_is_taken_out_of_an_answer(said, text):
    assert accept(Answer(said), **LIMITS) == text


@pytest.mark.parametrize(
    ("said", "finish", "message"),
    [
        ("", "stop", "0 words: min_words=2"),
        (" \n ", "stop", "0 words"),
        ("<think>A long thought", "stop", "0 words"),
        ("Car.", "stop", "1 words: min_words=2, max_words=8: 'Car.'"),
        ("one two three four five six seven eight nine", "stop", "9 words"),
        ("I cannot help with that.", "stop", "refused: 'I cannot help with that.'"),
        ("I can\u2019t see a video.", "stop", "refused"),
        ("I'm sorry, but I can't assist.", "stop", "refused"),
        ("Sorry, no.", "stop", "refused"),
        ("I'm unable to see it.", "stop", "refused"),
        ("As an AI, I do not see.", "stop", "refused"),
        ("A red car turns left.", "content_filter", "refused"),
        ("A red car turns", "length", "max_tokens ends its first sentence: 'A red car turns'"),
        ("A red car is 3.5 metres lo", "length", "max_tokens ends"),
        ("Hi. A red car turns", "length", "1 words"),
        ("<think>The thoughts do not end", "length", "max_tokens"),
    ],
)
def test_an_answer_that_is_no_caption_is_refused_with_the_reason(said, finish, message):
    with pytest.raises(ClipRejected, match=re.escape(message)) as error:
        accept(Answer(said, finish), **LIMITS)
    assert error.value.reason == RejectReason.NO_CAPTION


def test_a_cut_answer_ends_with_its_last_whole_sentence():
    assert accept(Answer('A car. It says "go!" Then the', "length"), **LIMITS) == 'A car. It says "go!"'
    assert accept(Answer("\u6c7d\u8f66\u3002\u8def\u4e0a\u3002\u7136\u540e", "length"), min_words=1, max_words=9) == (
        "\u6c7d\u8f66\u3002\u8def\u4e0a\u3002"
    )


@given(st.text(st.characters()), st.sampled_from(["stop", "length", "content_filter", "?"]))
def test_any_answer_is_a_caption_that_can_be_written_or_a_verdict(said, finish):
    try:
        text = accept(Answer(said, finish), **LIMITS)
    except ClipRejected:
        return
    assert text == " ".join(text.encode().decode().split())
    assert 2 <= len(text.split()) <= 8


# --- of clips -------------------------------------------------------------------------------------------------------


class Fake:
    """Says the brightness of the frames, later or never as told."""

    def __init__(self, delays_s=(), bad=(), **changes):
        self.config = CaptionConfig(**{**SEEN, "min_words": 1, **changes})
        self.delays_s, self.bad = delays_s, bad
        self.busy, self.most, self.lock = 0, 0, threading.Lock()

    def describe(self, frames_u8):
        number = int(frames_u8[0, 0, 0, 0])
        with self.lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
        time.sleep(self.delays_s[number] if self.delays_s else 0)
        with self.lock:
            self.busy -= 1
        if number in self.bad:
            raise ClipRejected(RejectReason.CAPTION_FAILED, f"busy {number}")
        return Answer(f"shade {number}")


def test_what_is_read_lies_evenly_in_the_window():
    asked = {}

    def read(uri, start_s, end_s, **how):
        asked.update(how, uri=uri, start_s=start_s, end_s=end_s)
        return Clip(np.full((1, 1, 1, 3), 7, np.uint8), np.zeros(1), "fake")

    after = caption_clip(window(), read=read, captioner=Fake(num_frames=4))
    assert (after["caption"], after["lineage"]) == ("shade 7", {"source_id": "s", "caption_source": "endpoint:m"})
    # twelve frames in four parts of three: frames 1, 4, 7 and 10
    sizes = {"height_px": 64, "width_px": 64}
    assert asked == {
        "uri": "/cars/red_car-1.mp4",
        "start_s": 1.125,
        "end_s": 2.5,
        "fps": 8 / 3,
        "num_frames": 4,
        **sizes,
    }
    caption_clip(window(), read=read, captioner=Fake(num_frames=12))
    assert (asked["start_s"], asked["fps"], asked["num_frames"]) == (1.0, 8.0, 12)
    caption_clip(window(num_frames=1), read=read, captioner=Fake())
    assert (asked["start_s"], asked["num_frames"]) == (1.0, 1)
    wide = dataclasses.replace(source()["probe"], height_px=720, width_px=960, pixel_aspect=4 / 3)
    caption_clip(window(probe=wide), read=read, captioner=Fake())
    assert (asked["height_px"], asked["width_px"]) == (288, 512)
    caption_clip(window(probe=dataclasses.replace(wide, height_px=2, width_px=4000)), read=read, captioner=Fake())
    assert (asked["height_px"], asked["width_px"]) == (1, 512)


def test_a_caption_that_is_given_stays_unless_it_is_to_be_replaced():
    had = window(caption="given", lineage={"source_id": "s", "caption_source": "sidecar"})
    assert caption_clip(had, read=no_read, captioner=Fake()) is had
    clip = Clip(np.full((1, 1, 1, 3), 7, np.uint8), np.zeros(1), "fake")
    assert caption_clip(had, read=lambda *_, **__: clip, captioner=Fake(recaption=True))["caption"] == "shade 7"
    assert had["caption"] == "given"


KINDS = st.lists(st.sampled_from(["plain", "given", "rejected", "unreadable", "unanswered"]), max_size=12)


@given(KINDS, st.integers(1, 4))
def test_many_rows_are_one_row_each_in_their_order(kinds, num_concurrent):
    reading_threads = set()

    def read(uri, *_, **__):
        reading_threads.add(threading.current_thread())
        number = int(uri)
        if kinds[number] == "unreadable":
            raise ClipRejected(RejectReason.UNREADABLE, "damaged")
        return Clip(np.full((1, 1, 1, 3), number, np.uint8), np.zeros(1), "fake")

    rows = []
    for number, kind in enumerate(kinds):
        row = window(source_uri=str(number), reject_detail=None, reject_stage=None)
        if kind == "given":
            row |= {"caption": "given", "lineage": {"source_id": "s", "caption_source": "sidecar"}}
        rows.append(guard.reject(row, "before", ClipRejected(RejectReason.DARK, "")) if kind == "rejected" else row)
    fake = Fake(bad=[number for number, kind in enumerate(kinds) if kind == "unanswered"])
    after = caption_rows(rows, read=read, captioner=fake, num_concurrent=num_concurrent)
    outcome = {
        "plain": lambda number: (f"shade {number}", "endpoint:m", None, None),
        "given": lambda number: ("given", "sidecar", None, None),
        "rejected": lambda number: (None, None, "dark", "before"),
        "unreadable": lambda number: (None, None, "unreadable", "caption_clip"),
        "unanswered": lambda number: (None, None, "caption_failed", "caption_clip"),
    }
    assert [row["source_uri"] for row in after] == [str(number) for number in range(len(kinds))]
    found = [(r["caption"], r["lineage"]["caption_source"], r["reject_reason"], r["reject_stage"]) for r in after]
    assert found == [outcome[kind](number) for number, kind in enumerate(kinds)]
    assert reading_threads <= {threading.current_thread()}


def test_answers_are_waited_for_together_but_not_more_than_so_many():
    read_ahead = []

    def read(uri, *_, **__):
        read_ahead.append(fake.busy)
        return Clip(np.full((1, 1, 1, 3), int(uri), np.uint8), np.zeros(1), "fake")

    fake = Fake(delays_s=[0.2 - 0.02 * number for number in range(9)])  # the first answer comes after the second
    rows = [window(source_uri=str(number)) for number in range(9)]
    after = caption_rows(rows, read=read, captioner=fake, num_concurrent=3)
    assert [row["caption"] for row in after] == [f"shade {number}" for number in range(9)]
    assert fake.most == 3
    assert max(read_ahead) <= 2  # frames of no more clips than that are in memory


def test_a_bug_among_many_rows_is_not_a_verdict():
    fake = Fake()
    fake.describe = lambda frames_u8: 1 / 0
    clip = Clip(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1), "fake")
    with pytest.raises(ZeroDivisionError):
        caption_rows([window()] * 3, read=lambda *_, **__: clip, captioner=fake, num_concurrent=2)
