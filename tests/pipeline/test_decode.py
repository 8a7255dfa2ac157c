"""Decoding real files, good and bad, in the child process."""

import importlib.util
import io
import os
import signal
import threading
import time

import av
import numpy as np
import pytest
from clip_files import FPS, encode, moving
from PIL import Image

from pipeline import media
from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import decode, decode_indexed
from pipeline.stages.decode import read_clip
from pipeline.stages.probe import inspect
from pipeline.stages.reader import ClipReader

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".ts": "mpegts"}


def write(path, video_u8, codec="libx264", **more):
    path.write_bytes(encode(video_u8, codec, FORMATS[path.suffix], **more))
    return str(path)


@pytest.fixture(scope="module")
def reader():
    with ClipReader(timeout_s=20.0) as shared:
        yield shared


def difference(one, other):
    return np.abs(one.astype(int) - other).mean()


def has_torchcodec():
    return importlib.util.find_spec("torchcodec") is not None


BACKENDS = [
    "pyav",
    pytest.param("torchcodec", marks=pytest.mark.skipif("not has_torchcodec()", reason="torchcodec is not installed")),
    "decord",
]
INSTALLED = ["pyav", "torchcodec", "decord"] if has_torchcodec() else ["pyav", "decord"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_frames_come_back(tmp_path, reader, backend):
    path = write(tmp_path / "a.mp4", moving())
    clip = reader.read(path, 0.0, 17 / FPS, fps=float(FPS), num_frames=17, backend=backend)
    assert clip.backend == backend
    assert clip.video_u8.shape == (17, 64, 64, 3)
    assert np.allclose(clip.times_s, np.arange(17) / FPS, atol=1e-5)
    assert difference(clip.video_u8, moving()) < 2


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_all_backends_give_the_same_pixels(tmp_path, reader, name, backend):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write(tmp_path / name, moving(40, 96, 128), codec, first=40)
    window = {"fps": 4.0, "num_frames": 9}
    facts = reader.probe(path)
    assert (facts.start_s, facts.num_frames) == (5.0, 40)
    one = reader.read(path, 6.0, 8.25, **window, backend="pyav")
    other = reader.read(path, 6.0, 8.25, **window, backend=backend)
    assert np.array_equal(one.video_u8, other.video_u8)
    assert np.allclose(one.times_s, other.times_s, atol=1e-5)
    assert np.allclose(one.times_s, 6.0 + np.arange(9) / 4)
    assert difference(one.video_u8, moving(40, 96, 128)[8:26:2]) < 3
    size = {"height_px": 48, "width_px": 64}
    small = [reader.read(path, 6.0, 8.25, **window, **size, backend=name).video_u8 for name in ("pyav", backend)]
    assert difference(*small) < 1
    assert difference(small[0], one.video_u8.reshape(9, 48, 2, 64, 2, 3).mean((2, 4))) < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_rates_are_sampled_by_time(tmp_path, reader, backend):
    times_ms = [0, 100, 200, 300, 400, 1400, 1500, 1600, 1700, 1800]
    path = write(tmp_path / "vfr.mkv", moving(10), first=times_ms, fps=10)
    clip = reader.read(path, 0.0, 1.9, fps=5.0, num_frames=9, backend=backend)
    assert np.allclose(clip.times_s, [0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 1.4, 1.6], atol=2e-3)


@pytest.mark.parametrize(("codec", "name"), [("libsvtav1", "a.mp4"), ("libx264", "a.ts"), ("libx264", "narrow.mp4")])
def test_files_that_decord_cannot_read(tmp_path, reader, codec, name):
    video_u8 = moving(17, 64, 48 if name == "narrow.mp4" else 64)
    path = write(tmp_path / name, video_u8, codec, options={})
    facts = reader.probe(path)
    clip = reader.read(path, facts.start_s, facts.end_s, fps=facts.fps, num_frames=17)
    assert clip.backend == "pyav"
    assert difference(clip.video_u8, video_u8) < 6


def test_another_backend_serves_where_the_first_does_not_work(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", moving(9))

    def fails(uri, window):
        raise ValueError("no\nluck")

    def is_missing(uri, window):
        raise ModuleNotFoundError("torchcodec")

    monkeypatch.setitem(decode.READERS, "pyav", fails)
    monkeypatch.setitem(decode.READERS, "torchcodec", is_missing)
    assert read_clip(path, 0.0, 9 / FPS, fps=8.0).backend == "decord"
    monkeypatch.setitem(decode.READERS, "decord", fails)
    with pytest.raises(ClipRejected, match="unreadable: pyav: ValueError: no luck; decord: ValueError: no luck"):
        read_clip(path, 0.0, 9 / FPS, fps=8.0)

    def sees_damage(uri, window):
        raise ClipRejected(RejectReason.WRONG_FRAMES, "damaged")

    monkeypatch.setitem(decode.READERS, "pyav", sees_damage)  # another that sees none is not asked
    monkeypatch.setitem(decode.READERS, "decord", decode_indexed.read_decord)
    with pytest.raises(ClipRejected, match="wrong_frames: damaged"):
        read_clip(path, 0.0, 9 / FPS, fps=8.0)


def test_dropped_frames_of_a_stream_copy_are_not_shown(tmp_path, reader):
    whole = write(tmp_path / "whole.mp4", moving(32), options={"g": "32", "crf": "4"})
    cut = str(tmp_path / "cut.mp4")
    with av.open(whole) as source, av.open(cut, "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                shift = round(1.0 / packet.time_base)  # an edit list hides the first second
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    facts = reader.probe(cut)
    assert facts.num_frames == 24
    clip = reader.read(cut, 0.0, 9 / FPS, fps=float(FPS), num_frames=9)
    assert difference(clip.video_u8, moving(32)[8:17]) < 2
    with pytest.raises(ClipRejected, match="wrong_frames"):  # it would show the hidden second
        reader.read(cut, 0.0, 9 / FPS, fps=float(FPS), num_frames=9, backend="decord")


def test_still_pictures_repeat_on_purpose(tmp_path, reader):
    path = write(tmp_path / "still.mp4", np.repeat(moving(1), 17, axis=0))
    clip = reader.read(path, 0.0, 17 / FPS, fps=float(FPS), num_frames=17)
    assert difference(clip.video_u8, np.repeat(moving(1), 17, axis=0)) < 2
    with pytest.raises(ClipRejected, match="may be repeated"):  # its equal frames may be lost ones
        reader.read(path, 0.0, 17 / FPS, fps=float(FPS), num_frames=17, backend="decord")


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_alike(tmp_path, reader, degrees):
    video_u8 = moving(9, 64, 96)
    video_u8[:, :16, :16] = [250, 20, 20]  # marks the stored top left corner
    path = write(tmp_path / "turned.mov", video_u8, rotation=degrees)
    facts = reader.probe(path)
    expected = np.rot90(video_u8, degrees // 90, axes=(1, 2))
    assert (facts.height_px, facts.width_px) == expected.shape[1:3]
    for backend in INSTALLED:
        clip = reader.read(path, 0.0, 9 / FPS, fps=float(FPS), backend=backend)
        assert difference(clip.video_u8, expected) < 4


def test_ten_bits_become_eight(tmp_path, reader):
    path = write(tmp_path / "deep.mp4", moving(9), "libx265", pix_fmt="yuv420p10le", options={"x265-params": "qp=4"})
    for backend in INSTALLED:
        clip = reader.read(path, 0.0, 9 / FPS, fps=float(FPS), backend=backend)
        assert difference(clip.video_u8, moving(9)) < 3


def test_pictures_are_upright_clips_of_one_frame(tmp_path, reader):
    picture = moving(1, 32, 64)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to look at it
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    facts = reader.probe(str(tmp_path / "a.png"))
    assert (facts.height_px, facts.width_px, facts.fps, facts.num_frames) == (64, 32, 0.0, 1)
    clip = reader.read(str(tmp_path / "a.png"), 0.0, 0.125, fps=8.0, num_frames=1, height_px=64, width_px=32)
    assert np.array_equal(clip.video_u8[0], np.rot90(picture, -1))
    assert clip.backend == "image"


def test_remote_files(tmp_path):
    import fsspec

    data = media.encode_mp4(moving(), FPS)
    fsspec.filesystem("memory").pipe_file("/decode/a.mp4", data)
    facts = inspect("memory://decode/a.mp4")
    assert facts.num_frames == 17
    for backend in INSTALLED:
        clip = read_clip("memory://decode/a.mp4", 0.0, 17 / FPS, fps=8.0, num_frames=17, backend=backend)
        assert difference(clip.video_u8, moving()) < 2


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for step in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, step * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(moving(1)[0]).save(buffer, "PNG")
    return buffer.getvalue()


BAD_FILES = {
    "empty.mp4": b"",
    "text.mp4": b"<html>not found</html>" * 50,
    "random.mp4": np.random.default_rng(0).bytes(5000),
    "picture.mp4": png_bytes(),
    "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
    "concat.mp4": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "broken.png": png_bytes()[:40],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_video_is_unreadable(tmp_path, reader, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    for call in (reader.probe, lambda path: reader.read(path, 0.0, 1.0, fps=8.0)):
        with pytest.raises(ClipRejected) as verdict:
            call(str(tmp_path / name))
        assert verdict.value.reason in (RejectReason.UNREADABLE, RejectReason.NOT_VIDEO)
        assert "\n" not in verdict.value.detail


def test_other_bad_files(tmp_path, reader):
    audio_only(tmp_path / "audio.mp4")
    whole = media.encode_mp4(moving(33, 96, 96), FPS)  # index in front: half of it still opens
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    expected = {"audio.mp4": "not_video", "half.mp4": "wrong_frames|unreadable", "missing.mp4": "unreadable"}
    for name, reason in expected.items():
        with pytest.raises(ClipRejected, match=reason):
            reader.probe(str(tmp_path / name))


def test_wrong_announcements_are_found(tmp_path, reader):
    path = write(tmp_path / "a.mp4", moving(17))
    with pytest.raises(ClipRejected, match="wrong_frames"):
        reader.read(path, 0.0, 33 / FPS, fps=float(FPS), num_frames=33)
    with pytest.raises(ClipRejected, match="wrong_frames"):
        reader.read(path, -2.0, 0.5, fps=float(FPS), num_frames=20)
    with pytest.raises(ValueError, match="backend"):
        read_clip(path, 0.0, 1.0, backend="other")
    with pytest.raises(ValueError, match="give both"):
        read_clip(path, 0.0, 1.0, height_px=3)


def test_a_file_that_blocks_costs_its_own_row_only(tmp_path):
    good = write(tmp_path / "a.mp4", moving(9))
    os.mkfifo(tmp_path / "blocks.mp4")
    with ClipReader(timeout_s=1.0) as reader:
        reader.probe(good)
        start_s = time.monotonic()
        with pytest.raises(ClipRejected, match="timeout"):
            reader.read(str(tmp_path / "blocks.mp4"), 0.0, 1.0, fps=8.0)
        assert 0.9 < time.monotonic() - start_s < 5
        assert reader.read(good, 0.0, 9 / FPS, fps=8.0).video_u8.shape[0] == 9


def test_a_child_that_dies_is_replaced(tmp_path):
    good = write(tmp_path / "a.mp4", moving(9))
    with ClipReader() as reader:
        reader.probe(good)
        first = reader._child
        os.kill(first.pid, signal.SIGSEGV)
        first.wait()
        assert reader.probe(good).num_frames == 9  # the clip is not blamed for the death of an older child
        assert reader._child.pid != first.pid


def test_a_clip_that_kills_its_child_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "blocks.mp4")
    with ClipReader(timeout_s=20.0) as reader:

        def kill_at_work():
            while not reader._num_calls:
                time.sleep(0.01)
            reader._child.send_signal(signal.SIGSEGV)

        killer = threading.Thread(target=kill_at_work)
        killer.start()
        with pytest.raises(ClipRejected, match=r"crashed: .*exit code -11"):
            reader.probe(str(tmp_path / "blocks.mp4"))
        killer.join()
        assert reader._child is None


def test_a_child_is_renewed_before_it_leaks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.stages.reader.CALLS_PER_CHILD", 2)
    good = write(tmp_path / "a.mp4", moving(9))
    with ClipReader() as reader:
        pids = []
        for _ in range(5):
            reader.probe(good)
            pids.append(reader._child.pid)
    assert len(set(pids)) == 3
