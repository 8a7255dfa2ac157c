"""A server that plays a vision-language model behind OpenAI's protocol, as well or as badly as it is told."""

import contextlib
import http.server
import json
import threading


def completion(text="A grey ramp grows brighter.", finish="stop", **message):
    """A reply (status, headers, body) that holds an answer."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        with contextlib.suppress(OSError):  # the client is gone
            reply(self) if callable(reply) else self.send(*reply)

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers), None))

    def send(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def endpoint(*replies):
    """A running server with `url` and the `requests` that it got: (path, headers, JSON).

    Args:
        replies: one a request, the last for ever; (status, headers, body), or a function of the handler.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.replies, server.requests = list(replies), []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
