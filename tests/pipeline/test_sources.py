"""Sources: what is found, in which order, with which captions, and what is said when it is not usable."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_files import FPS, encode, moving

from pipeline.errors import ClipRejected, SourceError
from pipeline.source_rows import SourceConfig
from pipeline.sources import list_sources, source_hash
from pipeline.stages.decode import read_clip
from pipeline.stages.probe import inspect


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def test_folder_is_recursive_sorted_and_reads_sidecars(tmp_path):
    late = touch(tmp_path / "sub" / "late.MOV")
    first = touch(tmp_path / "a.mp4")
    picture = touch(tmp_path / "b.png")
    touch(tmp_path / "a.txt", b" a red circle\n")
    touch(tmp_path / "b.json", json.dumps({"text": "a still"}).encode())
    touch(tmp_path / "._a.mp4")
    touch(tmp_path / "notes.md")
    rows = list_sources(str(tmp_path))
    assert [row.source_uri for row in rows] == [first, picture, late]
    assert [row.caption for row in rows] == ["a red circle", "a still", None]
    assert [row.caption_source for row in rows] == ["sidecar", "sidecar", None]


def test_a_single_file_is_a_source(tmp_path):
    path = touch(tmp_path / "one.webm")
    assert [row.source_uri for row in list_sources(path)] == [path]


def test_a_broken_sidecar_is_the_rows_problem(tmp_path):
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "a.json", b"{")
    touch(tmp_path / "b.mp4")
    touch(tmp_path / "b.json", b"[]")
    problems = [row.problem for row in list_sources(str(tmp_path))]
    assert "cannot be read" in problems[0]
    assert "holds a list" in problems[1]


ROWS = [
    {"path": "clips/a.mp4", "text": "one", "start_s": 1.0, "end_s": 2.5},
    {"path": None, "text": "nowhere", "start_s": None, "end_s": None},
    {"path": "/elsewhere/b.mp4", "text": "", "start_s": None, "end_s": None},
]


def write_jsonl(folder):
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return folder / "m.jsonl"


def write_csv(folder):
    lines = ["path,text,start_s,end_s", "clips/a.mp4,one,1.0,2.5", ",nowhere,,", "/elsewhere/b.mp4,,,"]
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder / "m.csv"


def write_parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "m.parquet")
    return folder / "m.parquet"


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_the_three_manifests_say_the_same(tmp_path, write):
    path = write(tmp_path)
    good, bad, bare = list_sources(str(path))
    assert good.source_uri == f"{tmp_path}/clips/a.mp4"
    assert (good.caption, good.caption_source, good.start_s, good.end_s) == ("one", "manifest", 1.0, 2.5)
    assert bad.source_uri == f"{path}#2"
    assert "names no file" in bad.problem
    assert (bare.source_uri, bare.caption, bare.problem) == ("/elsewhere/b.mp4", None, None)


def test_bad_lines_of_a_manifest_are_rows_with_a_problem(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"video": "a.mp4", "start_s": "soon"}\n{broken\n7\n{"video": "a.mp4", "cap": ["first", "second"]}\n'
    )
    late, broken, number, good = list_sources(str(path))
    assert "start_s or end_s" in late.problem
    assert "not JSON" in broken.problem
    assert "a int" in number.problem
    assert good.caption == "first"


def facts(rows):
    return [(row.source_uri.rsplit("/", 1)[1], row.caption, row.start_s, row.end_s) for row in rows]


PANDA_TIMES = "[['0:00:01.500', '0:00:03.000'], ['0:01:02.000', '1:00:00.250']]"
PANDA = f"""videoID,url,timestamp,caption,matching_score
abc,https://example.org/abc,"{PANDA_TIMES}","['a dog', ""the dog's cat""]","[0.4, 0.5]"
xyz,https://example.org/xyz,"{PANDA_TIMES}","['one']","[0.4]"
"""
OPEN_SORA_PLAN = [{"path": "a.mp4", "cap": ["a dog", "an animal"], "fps": 24.0}, {"path": "b.jpg", "cap": "a cat"}, 7]
KOHYA = '{"video_path": "a.mp4", "caption": "a dog"}\n{"image_path": "b.jpg", "caption": "a cat"}\n'
LAYOUT_FILES = {
    "panda70m": ("m.csv", PANDA),
    "open_sora_plan": ("m.json", json.dumps(OPEN_SORA_PLAN)),
    "open_sora": ("m.csv", "path,text,num_frames\na.mp4,a dog,33\nb.jpg,a cat,1\n"),
    "openvid": ("m.csv", "video,caption,aesthetic score,fps,seconds\na.mp4,a dog,5.5,24,3\nb.jpg,a cat,4,1,0\n"),
    "kohya": ("m.jsonl", KOHYA),
    "auto": ("m.jsonl", KOHYA),
}


@pytest.mark.parametrize("layout", LAYOUT_FILES)
def test_the_layouts_of_datasets(tmp_path, layout):
    name, text = LAYOUT_FILES[layout]
    (tmp_path / name).write_text(text)
    rows = list_sources(str(tmp_path / name), SourceConfig(layout=layout))
    if layout == "panda70m":
        assert facts(rows[:2]) == [("abc.mp4", "a dog", 1.5, 3.0), ("abc.mp4", "the dog's cat", 62.0, 3600.25)]
        assert "equal length" in rows[2].problem
        return
    assert facts(rows[:2]) == [("a.mp4", "a dog", None, None), ("b.jpg", "a cat", None, None)]
    assert [row.problem for row in rows[2:]] == (["a int, not an object"] if layout == "open_sora_plan" else [])


def test_columns_and_media_folder_are_given(tmp_path):
    (tmp_path / "m.csv").write_text("clip_name,long_caption\na.mp4,a dog\n")
    columns = {"path_column": "clip_name", "caption_column": "long_caption"}
    row = list_sources(str(tmp_path / "m.csv"), SourceConfig(**columns, media_folder="s3://bucket/videos"))[0]
    assert (row.source_uri, row.caption) == ("s3://bucket/videos/a.mp4", "a dog")
    with pytest.raises(ValueError, match="layout='other': must be one of"):
        SourceConfig(layout="other")


def test_two_lists_are_a_manifest(tmp_path):
    (tmp_path / "videos.txt").write_text("videos/a.mp4\n\nvideos/b.mp4\n")
    (tmp_path / "prompts.txt").write_text("a dog\nnothing\na cat\n")
    first, empty, last = list_sources(str(tmp_path))
    assert facts([first, last]) == [("a.mp4", "a dog", None, None), ("b.mp4", "a cat", None, None)]
    assert "names no file" in empty.problem
    (tmp_path / "prompts.txt").write_text("a dog\n")
    with pytest.raises(SourceError, match="3 lines, prompts.txt 1"):
        list_sources(str(tmp_path))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards_are_read_in_place(tmp_path):
    clip = encode(moving(9))
    members = {
        "b/001.txt": b"a dog",
        "b/001.mp4": clip,
        "b/002.json": b'{"caption": "a cat"}',
        "b/002.mp4": clip[:-900],
    }
    write_tar(tmp_path / "00000.tar", members | {"b/003.mp4": b"x", "b/003.json": b"{", "b/._001.mp4": b"x"})
    write_tar(tmp_path / "00001.tar", {"004.mp4": clip, "readme.md": b"x"})
    rows = list_sources(str(tmp_path))
    assert [row.caption for row in rows] == ["a dog", "a cat", None, None]
    assert [row.source_uri.rsplit("#")[-1] for row in rows] == ["b/001.mp4", "b/002.mp4", "b/003.mp4", "004.mp4"]
    assert "cannot be read" in rows[2].problem
    assert list_sources(str(tmp_path / "00001.tar")) == rows[3:]
    (tmp_path / "plain.mp4").write_bytes(clip)
    expected = read_clip(str(tmp_path / "plain.mp4"), 0.0, 9 / FPS).video_u8
    for uri in (rows[0].source_uri, rows[3].source_uri):
        facts = inspect(uri)
        assert facts == inspect(str(tmp_path / "plain.mp4"))
        for backend in ("pyav", "decord"):
            assert np.array_equal(read_clip(uri, 0.0, 9 / FPS, backend=backend).video_u8, expected)
    with pytest.raises(ClipRejected):
        inspect(rows[1].source_uri)  # what follows in the tar is not part of it
    (tmp_path / "broken.tar").write_bytes(b"not a tar at all" * 100)
    broken = [row for row in list_sources(str(tmp_path)) if row.source_uri.endswith("broken.tar")]
    assert len(broken) == 1  # the other shards are not lost with it
    assert "cannot be read as a tar" in broken[0].problem


def test_files_are_chosen_by_patterns(tmp_path):
    for name in ("train/a.mp4", "train/b.mov", "test/c.mp4"):
        touch(tmp_path / name)

    def found(**patterns):
        return [
            row.source_uri[len(str(tmp_path)) + 1 :] for row in list_sources(str(tmp_path), SourceConfig(**patterns))
        ]

    assert found(include=("*.mp4",)) == ["test/c.mp4", "train/a.mp4"]
    assert found(include=("*/train/*",), exclude=("*.mov",)) == ["train/a.mp4"]
    with pytest.raises(SourceError, match=r"leave none of its 3 files"):
        found(exclude=("*",))


def test_errors_tell_what_was_found(tmp_path):
    with pytest.raises(SourceError, match="is not there"):
        list_sources(str(tmp_path / "missing"))
    touch(tmp_path / "docs" / "readme.md")
    with pytest.raises(SourceError, match=r"found: \.md"):
        list_sources(str(tmp_path / "docs"))
    (tmp_path / "m.csv").write_text("name,words\nx,y\n")
    with pytest.raises(SourceError, match=r"'name', 'words'"):
        list_sources(str(tmp_path / "m.csv"))
    with pytest.raises(SourceError, match="cannot be opened"):
        list_sources("nosuchscheme://x")


def test_the_hash_follows_files_and_captions(tmp_path):
    path = touch(tmp_path / "a.mp4")
    before = source_hash(list_sources(str(tmp_path)))
    assert source_hash(list_sources(str(tmp_path))) == before
    touch(tmp_path / "a.txt", b"words")
    captioned = source_hash(list_sources(str(tmp_path)))
    os.utime(path, (1, 1))
    touched = source_hash(list_sources(str(tmp_path)))
    assert len({before, captioned, touched}) == 3
