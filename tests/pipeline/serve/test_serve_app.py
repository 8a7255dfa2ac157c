"""The whole app on a real Ray Serve: HTTP in, a worker's files out, and what happens when the worker is killed."""

import concurrent.futures
import io
import socket
import time
from pathlib import Path

import av
import fake_generator
import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline.serve.app import APP_NAME, serve_video
from pipeline.serve.config import ServeConfig
from video_dit.generator import GenerationRequest


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    return ServeConfig(
        model=f"{folder}/toy",
        storage=f"{folder}/out",
        generator="fake_generator",
        env_vars={"PYTHONPATH": str(Path(__file__).parent)},
        lease_s=2.0,
        poll_s=0.05,
        height_px=32,
        width_px=48,
        seconds=1.0,
        num_steps=4,
    )


@pytest.fixture(scope="module")
def client(ray_cluster, config):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve_video(config, port=port, blocking=False)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
    serve.shutdown()


def create(client, prompt="a ball", **fields):
    reply = client.post("/v1/videos", json={"prompt": prompt, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def wait_for(client, video_id, condition, timeout_s=30.0):
    """The video as soon as it meets the condition, and all progress seen until then."""
    seen, deadline_s = [], time.monotonic() + timeout_s
    while True:
        video = client.get(f"/v1/videos/{video_id}").json()
        seen.append(video["progress"])
        if condition(video):
            return video, seen
        assert time.monotonic() < deadline_s, video
        time.sleep(0.05)


def is_completed(video):
    assert video["status"] != "failed", video
    return video["status"] == "completed"


def test_a_prompt_becomes_a_video(client):
    files = {name: (None, value) for name, value in {"prompt": "a ball", "seconds": "1", "seed": "40"}.items()}
    created = client.post("/v1/videos", files=files).json()
    video, _ = wait_for(client, created["id"], is_completed)
    assert (video["progress"], video["steps_done"], video["steps_total"], video["attempt"]) == (100, 4, 4, 1)
    assert (video["seconds"], video["size"], video["num_frames"], video["fps"]) == ("1", "48x32", 9, 8.0)
    assert video["created_at"] <= video["completed_at"] < video["expires_at"]
    reply = client.get(f"/v1/videos/{video['id']}/content")
    assert reply.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(reply.content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    request = GenerationRequest(prompt="", height_px=32, width_px=48, num_frames=9, seed=40)
    assert np.abs(frames.astype(int) - fake_generator.frames(request).numpy()).max() <= 3


def test_pictures_and_parts_of_a_video(client):
    video_id = create(client)["id"]
    path = f"/v1/videos/{video_id}/content"
    wait_for(client, video_id, is_completed)
    for variant, size in (("thumbnail", (48, 32)), ("spritesheet", None)):
        reply = client.get(path, params={"variant": variant})
        assert reply.headers["content-type"] == "image/png"
        picture = Image.open(io.BytesIO(reply.content))
        assert size is None or picture.size == size
    whole = client.get(path).content
    part = client.get(path, headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    wrong = client.get(path, params={"variant": "hologram"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "variant")


def test_a_video_shows_its_progress_and_is_not_ready_before_its_end(client):
    running = create(client, "slow", num_inference_steps=20)
    waiting = create(client, "next")
    path = f"/v1/videos/{running['id']}"
    wait_for(client, running["id"], lambda video: video["status"] == "in_progress")
    assert client.get(f"/v1/videos/{waiting['id']}").json()["queue_position"] == 0
    not_ready = client.get(f"{path}/content")
    assert (not_ready.status_code, not_ready.json()["error"]["code"]) == (404, "video_not_ready")
    assert 250 <= int(client.get(path).headers["openai-poll-after-ms"]) <= 5000
    _, seen = wait_for(client, running["id"], is_completed)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    wait_for(client, waiting["id"], is_completed)


def test_deleting_stops_the_worker_at_once_and_removes_the_files(client, config):
    running, waiting, last = (create(client, prompt, num_inference_steps=100) for prompt in ("slow", "slow", "a ball"))
    wait_for(client, running["id"], lambda video: video["steps_done"] > 0)
    start_s = time.monotonic()
    for video_id in (running["id"], waiting["id"]):
        reply = client.request("DELETE", f"/v1/videos/{video_id}", headers={"content-type": "application/json"})
        assert reply.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
        assert client.get(f"/v1/videos/{video_id}").status_code == 404
        assert client.delete(f"/v1/videos/{video_id}").status_code == 404
    wait_for(client, last["id"], is_completed)
    assert time.monotonic() - start_s < 10  # the deleted ones would have taken 20 s
    folder = Path(config.storage, "videos", last["id"])
    assert folder.exists()
    client.delete(f"/v1/videos/{last['id']}")
    assert not folder.exists()
    assert client.get(f"/v1/videos/{last['id']}/content").json()["error"]["code"] == "video_not_found"


def test_a_failed_video_is_an_answer(client):
    video, _ = wait_for(client, create(client, "bad")["id"], lambda video: video["status"] == "failed")
    assert video["error"] == {"code": "invalid_input", "message": "num_frames=3 is not 1 + a multiple of 4"}


def test_many_clients_with_one_key_make_one_video(client):
    def post(_):
        return client.post("/v1/videos", json={"prompt": "a ball"}, headers={"idempotency-key": "one"})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(post, range(24)))
    assert {reply.status_code for reply in replies} == {200}
    (video_id,) = {reply.json()["id"] for reply in replies}
    listed = [video["id"] for video in client.get("/v1/videos", params={"limit": 100}).json()["data"]]
    assert listed.count(video_id) == 1


def test_errors_pass_through_serve_in_their_shape(client):
    reply = client.post("/v1/videos", json={"prompt": "x", "size": "50x32"}, headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (400, "mine")
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/videos/video_no").headers["x-request-id"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "toy"


def test_a_killed_worker_loses_no_video(client, ray_cluster):
    before = create(client, "slow", num_inference_steps=20, seed=7)
    waiting = create(client)
    wait_for(client, before["id"], lambda video: video["steps_done"] > 0)
    (worker,) = [
        each["name"]
        for each in ray_cluster.util.list_named_actors(all_namespaces=True)
        if f"{APP_NAME}#VideoWorker#" in each["name"]
    ]
    ray_cluster.kill(ray_cluster.get_actor(worker, namespace="serve"))
    video, _ = wait_for(client, before["id"], is_completed, timeout_s=60)
    assert (video["attempt"], video["seed"]) == (2, 7)
    wait_for(client, waiting["id"], is_completed)
    assert client.get("/healthz").json()["status"] == "ok"
