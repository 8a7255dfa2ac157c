"""The other routes, keys, health and content, without workers; and configs that are refused."""

from dataclasses import replace

import pytest
from sqlalchemy.exc import OperationalError

from pipeline import store as urls
from pipeline.serve.app import build_app, serve_video
from pipeline.serve.jobs import JobStore


def test_pages(client):
    ids = [client.post("/v1/videos", json={"prompt": str(i)}).json()["id"] for i in range(5)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in page["data"]] == ids[:2:-1]
    assert page | {"data": []} == {
        "object": "list",
        "data": [],
        "first_id": ids[4],
        "last_id": ids[3],
        "has_more": True,
    }
    page = client.get("/v1/videos", params={"limit": 4, "order": "asc", "after": ids[0]}).json()
    assert [video["id"] for video in page["data"]] == ids[1:]
    assert not page["has_more"]
    for params, param in (({"limit": 0}, "limit"), ({"order": "up"}, "order"), ({"after": "video_no"}, "after")):
        reply = client.get("/v1/videos", params=params)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_keys_are_asked_for_and_owners_are_apart(connect, client):
    client = connect(api_keys=("alpha", "beta"))
    alpha, beta = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta"))
    for headers in ({}, {"authorization": "Bearer gamma"}, {"authorization": "Basic alpha"}):
        for method, path in (("POST", "/v1/videos"), ("GET", "/v1/videos"), ("GET", "/v1/models")):
            reply = client.request(method, path, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
    video_id = client.post("/v1/videos", json={"prompt": "x"}, headers=alpha).json()["id"]
    path = f"/v1/videos/{video_id}"
    for method, each in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
        reply = client.request(method, each, headers=beta)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "video_not_found")
    assert client.get("/v1/videos", headers=beta).json()["data"] == []
    assert client.get("/v1/videos", params={"after": video_id}, headers=beta).status_code == 400
    assert client.get(path, headers=alpha).json()["id"] == video_id


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/videos/video_no", 404, "video_not_found"),
        ("GET", "/v1/videos/..%2f..%2fetc", 404, "route_not_found"),
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("PATCH", "/v1/videos", 405, "method_not_allowed"),
    ],
)
def test_unknown_things(client, method, path, status, code):
    reply = client.request(method, path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_health_needs_a_worker_and_the_store(config, connect, monkeypatch):
    client, store = connect(api_keys=("alpha",)), JobStore(config.database_url)
    reply = client.get("/healthz")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker")
    store.beat("w", config.name, forget_s=100)
    assert client.get("/healthz").json() == {"status": "ok", "num_workers": 1, "num_queued": 0}

    def unreachable(*_, **__):
        raise OperationalError("select", {}, Exception("gone"))

    monkeypatch.setattr(JobStore, "num_workers", unreachable)
    reply = client.get("/healthz")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_unavailable")
    assert reply.headers["retry-after"] == "5"
    monkeypatch.setattr(JobStore, "num_workers", lambda *_, **__: 1 / 0)
    reply = client.get("/healthz", headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert reply.json()["error"]["message"] == "the server failed; its log has request mine"
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("toy", "model")
    assert model["capabilities"]["stride"] == {"t": 4, "h": 16, "w": 16}


def test_the_schema_lists_every_route_and_the_body(client):
    schema = client.get("/openapi.json").json()
    assert {(method, path) for path, methods in schema["paths"].items() for method in methods} == {
        ("post", "/v1/videos"),
        ("get", "/v1/videos"),
        ("get", "/v1/videos/{video_id}"),
        ("delete", "/v1/videos/{video_id}"),
        ("get", "/v1/videos/{video_id}/content"),
        ("get", "/v1/models"),
        ("get", "/healthz"),
    }
    body = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert "num_inference_steps" in body["multipart/form-data"]["schema"]["properties"]


@pytest.mark.parametrize(
    ("header", "status", "expected"),
    [
        (None, 200, slice(None)),
        ("bytes=0-3", 206, slice(0, 4)),
        ("bytes=4-", 206, slice(4, None)),
        ("bytes=-3", 206, slice(-3, None)),
        ("bytes=2-1000", 206, slice(2, None)),
        ("bytes=-1000", 206, slice(None)),
        ("bytes=0-1,3-4", 200, slice(None)),
        ("bytes=5-2", 200, slice(None)),
        ("lines=0-3", 200, slice(None)),
        ("bytes=10-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_ranges(config, client, header, status, expected):
    path = completed(config, client, b"0123456789")
    reply = client.get(f"{path}/content", headers={"range": header} if header else {})
    assert reply.status_code == status
    if expected is None:
        assert reply.headers["content-range"] == "bytes */10"
        return
    assert reply.content == b"0123456789"[expected]
    assert (reply.headers["content-type"], reply.headers["accept-ranges"]) == ("video/mp4", "bytes")
    assert int(reply.headers["content-length"]) == len(reply.content)
    if status == 206:
        start, stop, _ = expected.indices(10)
        assert reply.headers["content-range"] == f"bytes {start}-{stop - 1}/10"


def test_a_range_of_another_version_is_not_mixed_in(config, client):
    path = completed(config, client, b"0123456789")
    headers = {"range": "bytes=0-3", "if-range": '"old"'}
    assert client.get(f"{path}/content", headers=headers).status_code == 200
    headers["if-range"] = client.get(f"{path}/content").headers["etag"]
    assert client.get(f"{path}/content", headers=headers).status_code == 206


def test_removed_files_are_said_to_be_gone(config, client):
    path = completed(config, client, b"0123456789")
    urls.local_path(f"{config.storage}/v.mp4", "test").unlink()
    reply = client.get(f"{path}/content")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "video_expired")


def completed(config, client, data):
    """The path of a video that a worker completed with these bytes."""
    video_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    store, url = JobStore(config.database_url), f"{config.storage}/v.mp4"
    urls.write_bytes(url, data)
    file = {"url": url, "content_type": "video/mp4", "size_bytes": len(data), "sha256": urls.content_hash(data)}
    store.complete(store.claim("w", config.name, 10.0, 3), {"video": file}, keep_s=100)
    store.close()
    return f"/v1/videos/{video_id}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lease_s": 0}, "lease_s=0 must be above 0"),
        ({"keep_s": -1}, "keep_s=-1 must not be negative"),
        ({"model": ""}, "model='' must be a folder URL"),
        ({"num_steps": 101}, "num_steps=101 must be above 0 and not above max_steps=100"),
        ({"api_keys": ("",)}, "api_keys holds an empty key"),
    ],
)
def test_a_wrong_config_is_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_an_app_that_cannot_work_is_refused_before_it_is_deployed(config):
    with pytest.raises(ValueError, match="a request that names only its prompt would be refused: height_px=50"):
        build_app(replace(config, height_px=50))
    with pytest.raises(ValueError, match="SQLite below storage needs a local or shared folder"):
        build_app(replace(config, storage="memory://out"))
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' is open to other machines"):
        serve_video(config, host="0.0.0.0")


def test_keys_do_not_show_in_logs(config):
    assert "alpha" not in repr(replace(config, api_keys=("alpha",)))
