"""What people's folders hold: one function per kind of file, each with what a reader must make of it.

A kind writes its file below a folder and returns its path. It is registered with the frames that come out, or with the
reasons for which it may be refused.
"""

import dataclasses
import io
import struct
import zipfile
from collections.abc import Callable

import av
import numpy as np
from clip_files import box, encode, moving, noise, picture_bytes, poke, remux, with_audio

PLAIN = moving(17)
BROKEN = ("unreadable", "not_video", "no_frames", "wrong_frames", "bad_times", "crashed")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file to make and its outcome.

    Attributes:
        make: from a folder to the file's path.
        reasons: for which it may be refused; empty where it must be read.
        expected: t h w 3, the frames; None where none may come out.
        tolerance: largest mean difference of 8-bit values.
    """

    make: Callable
    reasons: tuple = ()
    expected: np.ndarray | None = None
    tolerance: float = 3.0


KINDS: dict[str, Kind] = {}


def good(name, data, expected=PLAIN, **more):
    """A file that must be read; `data` is a function without arguments."""
    _add(name, data, expected=expected, **more)


def bad(name, data, *reasons):
    _add(name, data, reasons=reasons or BROKEN)


def either(name, data, *reasons, expected=PLAIN, **more):
    """Damage that may miss the pictures: refused, or read right; never read wrong."""
    _add(name, data, reasons=reasons or BROKEN, expected=expected, **more)


def _add(name, data, **more):
    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data())
        return str(path)

    assert name not in KINDS, name
    KINDS[name] = Kind(make, **more)


def plain(**more):
    return encode(PLAIN, **more)


def front():
    """An MP4 with its index in front of the data."""
    return plain(mux={"movflags": "faststart"}, fmt="mp4")


def long(**options):
    return encode(moving(33, 96, 96), options={"crf": "4", **options}, mux={"movflags": "faststart"})


# --- containers -----------------------------------------------------------------------------------------------------


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def free_box(size):
    return struct.pack(">I4s", size + 8, b"free") + bytes(size)


def shifted(data, inserted):
    """A file with its index at the end, and a box between the type and the data: the index points elsewhere."""
    _, end = box(data, b"ftyp")
    return data[:end] + inserted + data[end:]


def with_data_box(header):
    """The data box with another header; the index is in front of it, so that sizes of 8 bytes more must be mended."""
    data = front()
    begin, end = box(data, b"mdat")
    return data[:begin] + header(data[begin:end]) + data[end:]


ENCRYPTED = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "01" * 16, "encryption_kid": "02" * 16}

bad("empty.mp4", bytes, "unreadable")
bad("random.mp4", lambda: np.random.default_rng(0).bytes(5000), "unreadable")
bad("page.mp4", lambda: b"<html>not found</html>" * 50, "unreadable")
bad("text.mp4", lambda: b"id,caption\n1,a video\n" * 50, "unreadable")
bad("picture.mp4", picture_bytes, "unreadable")
bad("photo.mp4", lambda: picture_bytes("JPEG"), "unreadable")
bad("sound.mp4", lambda: with_audio(None, "wav", codec="pcm_s16le"), "not_video")
bad("archive.mp4", zipped, "unreadable")
bad("100_bytes.mp4", lambda: plain()[:100], "unreadable")
bad("no_index.mp4", lambda: plain()[: box(plain(), b"moov")[0]], "unreadable")
bad("half_an_index.mp4", lambda: plain()[: -len(plain()) // 20])
bad("half.mp4", lambda: long()[: len(long()) * 2 // 3], "wrong_frames", "unreadable")
bad("nine_tenths.mp4", lambda: long()[: len(long()) * 9 // 10], "wrong_frames", "unreadable")
good("fragmented.mp4", lambda: plain(mux={"movflags": "frag_keyframe+empty_moov"}, options={"g": "4", "crf": "4"}))
bad("half_fragmented.mp4", lambda: (d := plain(mux={"movflags": "frag_every_frame+empty_moov"}))[: len(d) * 2 // 3])
good("index_in_front.mp4", front)
good("mkv.mkv", lambda: plain(fmt="matroska"))
bad("half.mkv", lambda: (d := plain(fmt="matroska"))[: len(d) // 2])
good("webm.webm", lambda: plain(codec="libvpx-vp9", fmt="webm"))
good("avi.avi", lambda: plain(codec="mpeg4", fmt="avi", options={"qscale": "2"}, bit_rate=4_000_000))
good("ts.ts", lambda: plain(fmt="mpegts"))
either("ts_cut_in_the_middle.ts", lambda: encode(moving(33), fmt="mpegts")[188 * 20 :], expected=moving(33)[12:])
good("m2ts.m2ts", lambda: plain(fmt="mpegts", mux={"mpegts_m2ts_mode": "1"}))
good("flv.flv", lambda: plain(fmt="flv"))
good("3gp.3gp", lambda: plain(fmt="3gp"))
good("mov.mov", lambda: plain(fmt="mov"))
good("ps.mpg", lambda: encode(PLAIN, codec="mpeg2video", fmt="vob", fps=25, bit_rate=4_000_000), tolerance=4)
either("two_indices.mp4", lambda: (d := plain()) + d[box(d, b"moov")[0] :])
good("small_free_box.mp4", lambda: plain() + free_box(10))
good("huge_free_box.mp4", lambda: plain() + free_box(1 << 22))
bad("data_moved.mp4", lambda: shifted(plain(), free_box(1000)))
bad("nested_boxes.mp4", lambda: b"".join(struct.pack(">I4s", 8 * (100_000 - i), b"moov") for i in range(100_000)))
bad("box_of_size_7.mp4", lambda: struct.pack(">I4s", 7, b"moov") + plain())
good("data_to_the_end.mp4", lambda: with_data_box(lambda mdat: struct.pack(">I", 0) + mdat[4:]))
either("data_beyond_the_end.mp4", lambda: with_data_box(lambda mdat: struct.pack(">I", 1 << 30) + mdat[4:]))
either("id3_in_front.mp4", lambda: b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + plain())
either("bom_in_front.mp4", lambda: b"\xef\xbb\xbf" + plain())
either("rubbish_behind.mp4", lambda: plain() + b"rubbish!" * 100)
bad("sizes_huge.mp4", lambda: poke(plain(), b"stsz", 12, ">I", 0x7FFFFFFF))
either("sizes_double.mp4", lambda: poke(plain(), b"stsz", 8, ">I", 34))
bad("offsets_beyond_the_end.mp4", lambda: poke(plain(), b"stco", 8, ">I", 0x7FFFFFF0))
either("durations_zero.mp4", lambda: poke(plain(), b"stts", 12, ">I", 0), expected=None)
either("timescale_zero.mp4", lambda: poke(plain(), b"mdhd", 12, ">I", 0), expected=None)
bad("configuration_zero.mp4", lambda: poke(plain(), b"avcC", 0, "20s", b""))
bad("data_zero.mp4", lambda: (d := plain())[: box(d, b"mdat")[0] + 8] + bytes(9999) + d[box(d, b"mdat")[1] :])
bad("unknown_codec.mp4", lambda: plain().replace(b"avc1", b"zzzz"))
bad("encrypted.mp4", lambda: plain(mux=ENCRYPTED))
good("gif.gif", lambda: plain(codec="gif", fmt="gif", pix_fmt="rgb8", fps=10, options={"loop": "0"}), tolerance=40)
good("asf.asf", lambda: plain(codec="wmv2", fmt="asf", bit_rate=4_000_000), tolerance=4)
bad("nut.nut", lambda: plain(fmt="nut"), "unreadable")
bad("y4m.y4m", lambda: b"YUV4MPEG2 W64 H64 F8:1 C420\nFRAME\n" + bytes(64 * 96), "unreadable")

# --- streams --------------------------------------------------------------------------------------------------------


def cover_art():
    buffer = io.BytesIO()
    with av.open(io.BytesIO(with_audio(None))) as source, av.open(buffer, "w", format="mp4") as target:
        sound = target.add_stream_from_template(source.streams.audio[0])
        cover = target.add_stream("mjpeg")
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = sound
                target.mux(packet)
        target.mux(cover.encode(av.VideoFrame.from_ndarray(PLAIN[0], format="rgb24")))
        target.mux(cover.encode(None))
    return buffer.getvalue()


def two_sizes(fmt="mpegts"):
    return encode(PLAIN, fmt=fmt) + encode(moving(17, 96, 96), fmt=fmt, first=17)


def hidden_start(number, packet):
    """A stream copy from the middle: an edit list hides what comes before."""
    shift = round(1.0 / packet.time_base)
    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift


GROUPS_OF_8 = {"x264-params": "keyint=8:min-keyint=8:scenecut=0:bframes=0", "crf": "4"}

bad("sound_only.mp4", lambda: with_audio(None), "not_video")
bad("cover_art.mp4", cover_art, "not_video")
good("sound_too.mp4", lambda: with_audio(plain()))
good("sound_first.mp4", lambda: with_audio(plain(), audio_first=True))
good("two_videos.mp4", lambda: remux(plain(), lambda n, p: None, streams=2))
good("one_frame.mp4", lambda: encode(moving(1)), expected=moving(1))
good("two_frames.mp4", lambda: encode(moving(2)), expected=moving(2))
good("one_keyframe.mp4", lambda: encode(moving(33), options={"g": "999", "crf": "4"}), expected=moving(33))
good("only_keyframes.mp4", lambda: plain(options={"g": "1", "crf": "4"}))
good("no_b_frames.mp4", lambda: plain(options={"bf": "0", "crf": "4"}))
good("many_b_frames.mp4", lambda: plain(options={"x264-params": "bframes=8:b-adapt=0:b-pyramid=normal", "crf": "4"}))
good(
    "open_gops.mp4", lambda: encode(moving(33), options={"x264-params": "open-gop=1:keyint=8", "crf": "4"}), moving(33)
)
good("slices.mp4", lambda: plain(options={"x264-params": "slices=4", "crf": "4"}))
good("refreshed_bit_by_bit.mp4", lambda: encode(moving(33), options={"intra-refresh": "1", "crf": "4"}), moving(33))
good("interlaced.mp4", lambda: plain(options={"x264-params": "interlaced=1", "crf": "4"}), tolerance=5)
bad(
    "no_keyframe.ts",
    lambda: remux(plain(options={"x264-params": "scenecut=0"}), lambda n, p: not p.is_keyframe, fmt="mpegts"),
)
good("headless.ts", lambda: remux(plain(options=GROUPS_OF_8), lambda n, p: n > 2, "mpegts"), expected=PLAIN[8:])
# No decoder reports that a whole frame is gone; those that refer to it differ a little.
good(
    "frame_lost.mp4",
    lambda: remux(plain(options=GROUPS_OF_8), lambda n, p: n != 5),
    np.delete(PLAIN, 5, 0),
    tolerance=8,
)
bad("light_noise.mp4", lambda: (d := long())[: box(d, b"mdat")[0]] + noise(d[box(d, b"mdat")[0] :], 0.002, spare=700))
bad("heavy_noise.mp4", lambda: (d := long())[: box(d, b"mdat")[0]] + noise(d[box(d, b"mdat")[0] :], 0.2, spare=700))
either(
    "noisy_index.mp4", lambda: (d := plain())[: box(d, b"moov")[0]] + noise(d[box(d, b"moov")[0] :], 0.02, 1, spare=8)
)
bad("size_changes.ts", two_sizes)
good(
    "hidden_start.mp4", lambda: remux(encode(moving(32), options={"g": "32", "crf": "4"}), hidden_start), moving(32)[8:]
)

# --- times ----------------------------------------------------------------------------------------------------------


def at(*times_ms, fmt="matroska", n=17):
    return lambda: encode(moving(n), fmt=fmt, first=list(times_ms), fps=10)


EVEN = [125 * step for step in range(17)]


def moved(by_s, fmt="mp4"):
    def change(number, packet):
        ticks = round(by_s / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks

    return lambda: remux(plain(), change, fmt)


def same_time(number, packet):
    if number == 1:  # a frame that later ones are shown before
        packet.pts -= round(0.125 / packet.time_base)


good("variable_rate.mkv", at(*[40 * step + 3 * step * step for step in range(17)]))
good("gap_of_30_s.mkv", at(*[125 * step + 30_000 * (step > 8) for step in range(17)]))
good("from_5_s.mp4", moved(5.0))
good("from_5_s.ts", moved(5.0, "mpegts"))
good("from_a_million_s.mkv", moved(1e6, "matroska"))
either("before_zero.mkv", moved(-0.5, "matroska"))
good("hours_apart.mkv", at(*[3_600_000 * step for step in range(17)]))
bad("equal_times.mp4", lambda: remux(plain(options={"x264-params": "b-adapt=0"}), same_time), "bad_times")
good("1_fps.mp4", lambda: plain(fps=1))
good("240_fps.mp4", lambda: plain(fps=240))
good("1000_fps.mp4", lambda: plain(fps=1000))
good("ntsc.mp4", lambda: plain(first=[round(step * 1001 / 30) for step in range(17)], fps=30))
either("duration_lies.mp4", lambda: poke(plain(), b"mvhd", 16, ">I", 1 << 30))
bad("b_frames.avi", lambda: plain(fmt="avi"), "bad_times")

# --- pictures -------------------------------------------------------------------------------------------------------


def of_size(height, width, **more):
    return lambda: encode(moving(9, height, width), **more)


def of_format(pix_fmt, codec="libx264", **more):
    return lambda: encode(PLAIN, codec, pix_fmt=pix_fmt, **more)


def tagged(**tags):
    return lambda: encode(PLAIN, "libx265", pix_fmt="yuv420p10le", options={"x265-params": "qp=4"}, **tags)


COLOURED = np.concatenate([PLAIN[:, :, :32] // [1, 2, 4], PLAIN[:, :, 32:] // [4, 1, 2]], axis=2).astype(np.uint8)
FLASH = np.where(np.arange(17)[:, None, None, None] == 8, 255, PLAIN // 2).astype(np.uint8)

for height, width in [(2, 2), (16, 16), (16, 48), (24, 24), (48, 48), (98, 66), (66, 322), (130, 34)]:
    good(f"{height}x{width}.mp4", of_size(height, width), moving(9, height, width))
good("odd_33x35.mp4", of_size(33, 35, pix_fmt="yuv444p"), moving(9, 33, 35))
good("16x10000.mkv", of_size(16, 10_000, codec="ffv1", pix_fmt="yuv420p", fmt="matroska"), moving(9, 16, 10_000))
for pix_fmt in ("yuv422p", "yuv444p", "yuvj420p", "yuv420p10le", "yuv444p10le", "nv12"):
    good(f"{pix_fmt}.mp4", of_format(pix_fmt))
good("gray.mp4", of_format("gray"), tolerance=10)  # as ffmpeg shows it: black is grey
good("gbrp.mkv", of_format("gbrp10le", "ffv1", fmt="matroska", options={"level": "3"}))
good("rgb.mkv", of_format("bgr0", "ffv1", fmt="matroska", options={"level": "3"}))
good("12_bits.mkv", of_format("yuv420p12le", "ffv1", fmt="matroska"))
good("alpha.webm", of_format("yuva420p", "libvpx-vp9", fmt="webm"))
good("coloured.mp4", lambda: encode(COLOURED, options={"crf": "1"}), COLOURED, tolerance=4)
good("full_range.mp4", lambda: encode(COLOURED, pix_fmt="yuvj420p", options={"crf": "1"}), COLOURED, tolerance=4)
bad("pq.mp4", tagged(color_trc=16, color_primaries=9, colorspace=9), "hdr")
bad("hlg.mp4", tagged(color_trc=18, color_primaries=9, colorspace=9), "hdr")
for degrees in (90, 180, 270):
    turned = np.rot90(moving(9, 64, 96), degrees // 90, axes=(1, 2))
    good(f"turned_{degrees}.mov", of_size(64, 96, rotation=degrees, fmt="mov"), turned)
good("wide_pixels.mp4", lambda: plain(sample_aspect_ratio=2))
good("all_black.mp4", lambda: encode(0 * PLAIN), 0 * PLAIN)
good("all_still.mp4", lambda: encode(PLAIN[:1].repeat(17, axis=0)), PLAIN[:1].repeat(17, axis=0))
good("flash.mp4", lambda: encode(FLASH), FLASH)

# --- codecs ---------------------------------------------------------------------------------------------------------

good("hevc.mp4", lambda: plain(codec="libx265", options={"x265-params": "qp=4"}))
good(
    "hevc_open_gops.mkv",
    lambda: encode(moving(33), "libx265", "matroska", options={"x265-params": "qp=4:keyint=8:open-gop=1"}),
    moving(33),
)
good("av1.mp4", lambda: plain(codec="libsvtav1", options={"crf": "10"}))
good("av1.webm", lambda: plain(codec="libsvtav1", fmt="webm", options={"crf": "10"}))
good("vp8.webm", lambda: plain(codec="libvpx", fmt="webm", bit_rate=4_000_000))
good("vp9.mp4", lambda: plain(codec="libvpx-vp9"))
good("mpeg2.ts", lambda: encode(PLAIN, "mpeg2video", "mpegts", fps=25, bit_rate=4_000_000), tolerance=4)
good("mpeg4.mp4", lambda: plain(codec="mpeg4", bit_rate=4_000_000), tolerance=4)
good("mpeg4_b_frames.mp4", lambda: plain(codec="mpeg4", bit_rate=4_000_000, options={"bf": "2"}), tolerance=4)
good("mjpeg.avi", lambda: plain(codec="mjpeg", fmt="avi", pix_fmt="yuvj420p", bit_rate=4_000_000), tolerance=4)
good("mjpeg.mov", lambda: plain(codec="mjpeg", fmt="mov", pix_fmt="yuvj420p", bit_rate=4_000_000), tolerance=4)
good("ffv1.mkv", lambda: plain(codec="ffv1", fmt="matroska"))
good("prores.mov", lambda: plain(codec="prores_ks", fmt="mov", pix_fmt="yuv422p10le"))
good(
    "dnxhr.mov",
    lambda: encode(moving(9, 128, 256), "dnxhd", "mov", pix_fmt="yuv422p", options={"profile": "dnxhr_hq"}),
    moving(9, 128, 256),
)

# --- paths ----------------------------------------------------------------------------------------------------------


def path_kind(name, make, **more):
    KINDS[name] = Kind(make, **more)


def link(folder):
    (folder / "target.mp4").write_bytes(plain())
    (folder / "link.mp4").symlink_to(folder / "target.mp4")
    return str(folder / "link.mp4")


def remote(folder):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/kinds/remote.mp4", plain())
    return "memory://kinds/remote.mp4"


def folder_like_a_file(folder):
    (folder / "folder.mp4").mkdir()
    return str(folder / "folder.mp4")


def dangling(folder):
    (folder / "dangling.mp4").symlink_to("nowhere")
    return str(folder / "dangling.mp4")


for name in (
    "ünï çødé 視頻.mp4",
    "with spaces.mp4",
    "with\nnewline.mp4",
    "-leading-dash.mp4",
    "%00.mp4",
    "a" * 200 + ".mp4",
):
    good(name, plain)
path_kind("link", link, expected=PLAIN)
path_kind("memory://", remote, expected=PLAIN)
path_kind("folder", folder_like_a_file, reasons=("unreadable",))
path_kind("dangling link", dangling, reasons=("unreadable",))
path_kind("missing", lambda folder: str(folder / "missing.mp4"), reasons=("unreadable",))
path_kind("missing remote", lambda folder: "memory://kinds/missing.mp4", reasons=("unreadable",))
path_kind("/dev/null", lambda folder: "/dev/null", reasons=("unreadable",))
bad(
    "hls.mp4",
    lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
    "unreadable",
)
bad("concat.mp4", lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "unreadable")
bad(
    "session.mp4", lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "unreadable"
)
