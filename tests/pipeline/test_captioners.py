"""The endpoint captioner against a server that plays OpenAI's endpoint, good and bad."""

import base64
import contextlib
import email.utils
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ClipRejected
from pipeline.stages import captioners
from pipeline.stages.caption import CaptionConfig, caption_clip, caption_rows
from pipeline.stages.captioners import EndpointCaptioner, load_captioner
from pipeline.stages.reader import ClipReader
from tests.pipeline.clip_files import encode, moving
from tests.pipeline.fake_endpoint import completion, endpoint

FRAMES = np.zeros((2, 8, 8, 3), np.uint8)
KEY = "sk-0123456789abcdef"


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server with these replies: see `fake_endpoint.endpoint`."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(captioners.KEY_VARIABLE, raising=False)
    with contextlib.ExitStack() as servers:
        yield lambda *replies: servers.enter_context(endpoint(*replies))


def settings(url, **changes):
    return CaptionConfig(fallback="endpoint", url=url, model="seer-7b", **changes)


def ask(server, **changes):
    """The answer, or the verdict's detail; and the waits between tries."""
    waits_s = []
    captioner = EndpointCaptioner(settings(server.url, **changes), sleep=waits_s.append)
    try:
        return captioner.describe(FRAMES), waits_s
    except ClipRejected as verdict:
        return str(verdict).removeprefix("caption_failed: "), waits_s


@pytest.fixture(scope="module")
def clip_row(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    path.write_bytes(encode(moving(16, 48, 64)))
    with ClipReader() as reader:
        facts = reader.probe(str(path))
    place = {"source_uri": str(path), "probe": facts, "start_s": 0.0, "end_s": 2.0, "fps": 8.0, "num_frames": 16}
    lineage = {"source_id": facts.source_id, "caption_source": None}
    return {**place, "caption": None, "lineage": lineage, "reject_reason": None}


def test_the_request_is_one_of_openais_protocol_and_shows_the_clip(serve, clip_row, monkeypatch):
    monkeypatch.setenv(captioners.KEY_VARIABLE, f"{KEY}\n")
    server = serve(completion())
    config = settings(server.url + "/", num_frames=4, max_side_px=32, max_tokens=77, prompt="Say what you see.")
    with ClipReader() as reader:
        row = caption_clip(clip_row, read=reader.read, captioner=load_captioner(config))
        expected = moving(16, 48, 64)[[1, 5, 9, 13]].mean(axis=(1, 2, 3))  # shown at 1.5, 5.5, 9.5 and 13.5 frames
    assert row["caption"] == "A grey ramp grows brighter."
    assert row["lineage"] == {"source_id": clip_row["probe"].source_id, "caption_source": "endpoint:seer-7b"}
    ((path, headers, body),) = server.requests
    assert (path, headers["Authorization"], headers["Content-Type"]) == (
        "/v1/chat/completions",
        f"Bearer {KEY}",
        "application/json",
    )
    (message,) = body.pop("messages")
    assert body == {"model": "seer-7b", "max_tokens": 77, "temperature": 0, "seed": 0}
    *images, text = message["content"]
    assert message["role"] == "user"
    assert text == {"type": "text", "text": "These are 4 frames of one video, in order. Say what you see."}
    shades = []
    for image in images:
        assert image["type"] == "image_url"
        head, data = image["image_url"]["url"].split(",")
        assert head == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (32, 24), "RGB")
        shades.append(np.asarray(picture).mean())
    np.testing.assert_allclose(shades, expected, atol=1.5)  # frames are 6 apart
    assert KEY not in repr(config) + repr(vars(config)) + json.dumps(row, default=str)


def test_without_a_key_none_is_sent_and_a_picture_is_called_one(serve):
    server = serve(completion())
    EndpointCaptioner(settings(server.url)).describe(FRAMES[:1])
    _, headers, body = server.requests[0]
    assert "Authorization" not in headers
    assert body["messages"][0]["content"][-1]["text"].startswith("This is one picture. Write a caption")


@pytest.mark.parametrize("key", ["a\nb", "schl\u00fcssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(serve, monkeypatch, key):
    monkeypatch.setenv(captioners.KEY_VARIABLE, key)
    with pytest.raises(ValueError, match="KINORAY_CAPTION_API_KEY: must be printable ASCII") as error:
        EndpointCaptioner(settings("http://h/v1"))
    assert key not in str(error.value)


def test_answers_carry_how_they_end(serve):
    assert ask(serve(completion("A dog. A ca", "length")))[0] == ("A dog. A ca", "length")
    assert ask(serve(completion(None, None)))[0] == ("", "stop")
    assert ask(serve(completion(None, refusal="I can't.")))[0] == ("I can't.", "stop")


def test_a_busy_server_is_asked_again_when_it_says_so(serve):
    server = serve((429, {"Retry-After": "7"}, b"busy"), (503, {}, b""), completion("A dog runs."))
    answer, waits_s = ask(server)
    assert (answer.text, len(server.requests)) == ("A dog runs.", 3)
    assert waits_s[0] == 7
    assert 1 <= waits_s[1] <= 2
    assert server.requests[0][2] == server.requests[2][2]


def test_a_server_that_fails_for_ever_is_given_up_after_growing_waits(serve):
    server = serve((500, {}, b'{"error": {"message": "CUDA out of\\nmemory", "type": "x"}}'))
    detail, waits_s = ask(server, num_tries=8)
    assert detail == f"{server.url}/chat/completions: 500 CUDA out of memory (try 8 of 8)"
    assert len(server.requests) == 8
    for wait_s, longest_s in zip(waits_s, [1, 2, 4, 8, 16, 30, 30], strict=True):
        assert longest_s / 2 <= wait_s <= longest_s
    assert len({wait_s / longest_s for wait_s, longest_s in zip(waits_s, [1, 2, 4, 8], strict=False)}) == 4  # by chance


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_request_that_is_wrong_is_not_sent_again(serve, monkeypatch, status):
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    said = json.dumps({"error": {"message": f"Wrong key {KEY}: {'x' * 160}{KEY}" + "y" * 5000}}).encode()
    server = serve((status, {}, said))
    detail, waits_s = ask(server)
    assert waits_s == []
    assert len(server.requests) == 1
    assert f" {status} Wrong key ***: x" in detail
    assert len(detail) < 300
    assert KEY[:6] not in detail  # where the message is cut, it is not cut in two


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", ""),
        (b"<html>Welcome", "<html>Welcome"),
        (b'{"choices": [{"message": {"content": "A do', '{"choices": [{"message": {"content": "A do'),
        (b"[" * 100_000, "[[["),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b'{"choices": []}', '{"choices": []}'),
        (b'{"choices": [{"message": {"content": [1]}}]}', '{"choices": [{"message": {"content": [1]}}]}'),
        (b'{"choices": "abc"}', '{"choices": "abc"}'),
        (b"null", "null"),
        (b'{"error": {"message": "the model is loading"}}', "the model is loading"),
    ],
)
def test_what_is_no_completion_is_a_verdict(serve, body, said):
    server = serve((200, {}, body))
    detail, waits_s = ask(server, num_tries=2)
    assert f"200, but no chat completion: {said}" in detail
    assert len(waits_s) == 1


def test_a_slow_server_costs_its_time_and_no_more(serve):
    def silent(_):
        time.sleep(4.0)

    def drip(handler):  # a byte before every timeout of the socket
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    for reply in (silent, drip):
        start_s = time.monotonic()
        detail, _ = ask(serve(reply), timeout_s=0.3, num_tries=1)
        assert "TimeoutError" in detail
        assert time.monotonic() - start_s < 2.0


def test_an_answer_without_end_is_not_read(serve):
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"x" * (1 << 20))
            sent.append(1)

    server = serve(flood)
    assert "200, an answer of more than 1,048,576 bytes (try 1 of 5)" in ask(server)[0]
    assert len(server.requests) == 1
    assert len(sent) < 100  # of socket buffers


def test_connections_that_fail_are_tried_again(serve):
    def hang_up(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    def stop_short(handler):
        handler.send(200, {"Transfer-Encoding": "chunked", "Content-Length": ""}, b"ff\r\n{")

    server = serve(hang_up, stop_short, completion("A dog."))
    assert ask(server)[0].text == "A dog."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server.url = f"http://127.0.0.1:{port}/v1"
    detail, waits_s = ask(server, num_tries=3)
    assert "Connection refused" in detail
    assert len(waits_s) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_told_and_the_key_stays(serve, monkeypatch, status):
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    elsewhere = serve(completion())
    server = serve((status, {"Location": elsewhere.url}, b""))
    detail, _ = ask(server)
    assert f"{status} {elsewhere.url} (try 1 of 5)" in detail
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("value", "low_s", "high_s"),
    [
        ("12", 12, 12),
        ("2.5", 2.5, 2.5),
        (email.utils.formatdate(0, usegmt=True), 0.5, 1),
        ("-3", 0.5, 1),
        ("nan", 0.5, 1),
        ("soon", 0.5, 1),
    ],
)
def test_a_server_may_ask_for_time(serve, value, low_s, high_s):
    _, (wait_s,) = ask(serve((429, {"Retry-After": value}, b""), completion()))
    assert low_s <= wait_s <= high_s


def test_a_server_may_name_the_moment(serve):
    when = email.utils.formatdate(time.time() + 90, usegmt=True)
    _, (wait_s,) = ask(serve((429, {"Retry-After": when}, b""), completion()))
    assert 30 < wait_s <= 90


@pytest.mark.parametrize("value", ["86400", "inf", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_but_not_for_a_day(serve, value):
    detail, waits_s = ask(serve((429, {"Retry-After": value}, b"quota"), completion()))
    assert "429 quota (try 1 of 5)" in detail
    assert waits_s == []


def test_many_clips_are_asked_for_at_once(serve, clip_row):
    together = threading.Barrier(6, timeout=10)

    def reply(handler):
        together.wait()
        handler.send(*completion())

    server = serve(reply)
    captioner = EndpointCaptioner(settings(server.url))
    with ClipReader() as reader:
        after = caption_rows([clip_row] * 6, read=reader.read, captioner=captioner, num_concurrent=6)
    assert [row["caption"] for row in after] == ["A grey ramp grows brighter."] * 6
    assert len(server.requests) == 6
