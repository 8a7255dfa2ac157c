"""Every kind of file gives its frames or a reason: nothing crashes, hangs or shows wrong pictures in silence."""

import numpy as np
import pytest
from clip_kinds import KINDS

from pipeline.errors import ClipRejected
from pipeline.stages.decode import READERS, read_clip
from pipeline.stages.probe import inspect
from pipeline.stages.reader import ClipReader


@pytest.fixture(scope="module")
def reader():
    with ClipReader(timeout_s=20.0) as shared:
        yield shared


def outcome(probe, read, uri, **options):
    """The clip of a whole file, or the reason why there is none."""
    try:
        facts = probe(uri)
        return read(uri, facts.start_s, facts.end_s, **options)
    except ClipRejected as verdict:
        return str(verdict.reason) if verdict.detail and "\n" not in verdict.detail else f"bad text: {verdict.detail}"


def check(kind, found, may_refuse=False):
    if isinstance(found, str):
        assert may_refuse or found in kind.reasons, f"refused: {found}"
        return
    assert kind.expected is not None, f"{len(found.video_u8)} frames of a file that holds no good ones"
    assert found.video_u8.shape == kind.expected.shape
    assert np.all(np.diff(found.times_s) > 0)
    off = np.abs(found.video_u8.astype(np.int16) - kind.expected).mean((1, 2, 3))
    assert off.max() <= kind.tolerance, f"frames are wrong by {off.round(1)}"


def calls(reader, uri):
    """In the child process; what lies in this process's memory is read here."""
    return (inspect, read_clip) if uri.startswith("memory://") else (reader.probe, reader.read)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_gives_its_frames_or_a_reason(tmp_path, reader, name):
    uri = KINDS[name].make(tmp_path)
    check(KINDS[name], outcome(*calls(reader, uri), uri))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.reasons])
def test_any_window_of_a_good_file_is_that_part_of_the_whole(tmp_path, reader, name):
    uri = KINDS[name].make(tmp_path)
    probe, read = calls(reader, uri)
    facts = probe(uri)
    whole = read(uri, facts.start_s, facts.end_s)
    for first in range(0, len(whole.times_s), 5):
        times_s = whole.times_s[first : first + 3]
        stop_s = np.append(whole.times_s, facts.end_s)[min(first + 3, len(whole.times_s))]
        part = read(uri, times_s[0], stop_s)
        assert np.array_equal(part.video_u8, whole.video_u8[first : first + 3])
        assert np.allclose(part.times_s, times_s, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name in READERS if name != "pyav"])  # auto is PyAV's
def test_other_backends_refuse_more_but_show_nothing_wrong(tmp_path, reader, backend):
    pytest.importorskip(backend)
    served = 0
    for name, kind in KINDS.items():
        uri = kind.make(tmp_path)
        found = outcome(*calls(reader, uri), uri, backend=backend)
        try:
            check(kind, found, may_refuse=True)
        except AssertionError as problem:
            raise AssertionError(f"{name}: {problem}") from problem
        served += not isinstance(found, str)
    assert served > len(KINDS) / 4
