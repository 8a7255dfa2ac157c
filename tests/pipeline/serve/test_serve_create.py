"""POST /v1/videos: every way to ask wrongly, and what a right call is turned into."""

import json

import pytest


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({}, "prompt", "missing_field", "prompt is required"),
        ({"prompt": ""}, "prompt", "invalid_value", "at least 1 character"),
        ({"prompt": 7}, "prompt", "invalid_value", "valid string"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "string"),
        ({"prompt": "x" * 4001}, "prompt", "invalid_value", "prompt has 4001 characters, at most 4000 are allowed"),
        ({"promt": "x"}, "prompt", "missing_field", "unknown field 'promt', did you mean 'prompt'?"),
        ({"prompt": "x", "guidance": 3}, "guidance", "unknown_field", "did you mean 'guidance_scale'?"),
        ({"prompt": "x", "model": "sora-2"}, "model", "model_not_found", "model='sora-2': this server runs 'toy'"),
        ({"prompt": "x", "size": "big"}, "size", "invalid_value", "size='big'"),
        (
            {"prompt": "x", "size": "50x32"},
            "size",
            "invalid_value",
            "width_px=50 is not a multiple of 16: use 48 or 64",
        ),
        ({"prompt": "x", "width": 32, "height": 50}, "height", "invalid_value", "height_px=50 is not a multiple of 16"),
        ({"prompt": "x", "width": 32}, None, "invalid_value", "width and height go together"),
        ({"prompt": "x", "size": "32x32", "width": 32, "height": 32}, None, "invalid_value", "not both"),
        ({"prompt": "x", "num_frames": 8}, "num_frames", "invalid_value", "use 5 or 9"),
        ({"prompt": "x", "num_frames": 9, "seconds": 1}, None, "invalid_value", "seconds or num_frames, not both"),
        ({"prompt": "x", "seconds": "soon"}, "seconds", "invalid_value", "seconds='soon'"),
        ({"prompt": "x", "seconds": -1}, "seconds", "invalid_value", "greater than 0"),
        ({"prompt": "x", "fps": "nan"}, "fps", "invalid_value", "finite"),
        ({"prompt": "x", "seed": -1}, "seed", "invalid_value", "greater than or equal to 0"),
        ({"prompt": "x", "seed": 2**63}, "seed", "invalid_value", "less than"),
        ({"prompt": "x", "num_inference_steps": 101}, "num_inference_steps", "invalid_value", "at most 100"),
        (
            {"prompt": "x", "size": "4096x4096"},
            "size",
            "too_many_pixels",
            "17 frames of 4096x4096 are 285212672 pixels",
        ),
        ({"prompt": "x", "input_reference": "u"}, "input_reference", "unsupported_field", "from text only"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_rule(client, fields, param, code, message):
    reply = client.post("/v1/videos", content=json.dumps(fields))
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]
    assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[1]", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"x", "text/plain", 415, "unsupported_media_type"),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 400, "duplicate_field"),
        (b"no boundary", "multipart/form-data", 400, "invalid_request"),
        (b"x" * 2000, "application/json", 413, "body_too_large"),
    ],
)
def test_a_malformed_body_is_refused(connect, content, content_type, status, code):
    client = connect(max_body_bytes=1000 if status == 413 else 2**20)
    reply = client.post("/v1/videos", content=content, headers={"content-type": content_type})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_a_file_is_refused_by_name(client):
    reply = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("f.png", b"png", "image/png")})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input_reference")


def test_json_and_form_give_the_same_job(client):
    fields = {"prompt": "a ball", "model": "toy", "seconds": "4", "size": "64x48", "seed": "7", "fps": "12"}
    fields |= {"num_inference_steps": "5", "guidance_scale": "2.5", "negative_prompt": "rain"}
    parts = {name: (None, value) for name, value in fields.items()}
    replies = [client.post("/v1/videos", json=fields), client.post("/v1/videos", data=fields)]
    replies.append(client.post("/v1/videos", files=parts))  # multipart, as the SDK sends it
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    videos = [reply.json() for reply in replies]
    expected = {
        "object": "video",
        "model": "toy",
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "expires_at": None,
        "seconds": "4",
        "size": "64x48",
        "prompt": "a ball",
        "error": None,
        "seed": 7,
        "num_frames": 49,  # 4 s x 12 fps = 48: 49 is the nearest 1 + 4k
        "fps": 12.0,
        "steps_done": 0,
        "steps_total": 5,
        "attempt": 0,
    }
    for place, video in enumerate(videos):
        own = {name: video.pop(name) for name in ("id", "created_at", "queue_position")}
        assert video == expected
        assert own["queue_position"] == place
    assert replies[0].headers["openai-poll-after-ms"] == "1000"


@pytest.mark.parametrize(
    ("fields", "num_frames", "seconds"),
    [
        ({"seconds": 4}, 33, "4"),
        ({"seconds": "0.1"}, 1, "0.1"),
        ({"seconds": 1.25}, 9, "1.25"),
        ({"seconds": 0.875}, 9, "0.875"),  # 7 frames lie between 5 and 9: the longer
        ({"num_frames": 5}, 5, "0.625"),
        ({}, 17, "2.125"),
        ({"num_frames": 33, "fps": 16}, 33, "2.0625"),
    ],
)
def test_seconds_become_the_nearest_count_of_frames(client, fields, num_frames, seconds):
    video = client.post("/v1/videos", json={"prompt": "x", **fields}).json()
    assert (video["num_frames"], video["seconds"]) == (num_frames, seconds)


def test_a_seed_is_fixed_when_the_job_is_accepted(client):
    first, second = (client.post("/v1/videos", json={"prompt": "x"}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert client.get(f"/v1/videos/{first['id']}").json() == first


def test_an_idempotency_key_is_answered_with_the_job_it_made(client):
    def post(prompt, key):
        return client.post("/v1/videos", json={"prompt": prompt}, headers={"idempotency-key": key})

    first, again, other, conflict = post("x", "a"), post("x", "a"), post("x", "b"), post("y", "a")
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert other.json()["id"] != first.json()["id"]
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_full_queue_answers_429(connect):
    client = connect(max_queue=2)
    replies = [client.post("/v1/videos", json={"prompt": "x"}) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[2].headers["retry-after"] == "10"
    assert replies[2].json()["error"] | {"message": ""} == {
        "message": "",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    client.delete(f"/v1/videos/{replies[0].json()['id']}")
    assert client.post("/v1/videos", json={"prompt": "x"}).status_code == 200
