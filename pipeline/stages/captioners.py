"""Who sees frames and says what they show: a server that speaks OpenAI's protocol, or a model of transformers."""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from PIL import Image

import pipeline
from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.caption import CaptionConfig, Captioner
from pipeline.stages.caption_answer import Answer, one_line
from pipeline.stages.window import Video

KEY_VARIABLE = "KINORAY_CAPTION_API_KEY"
MAX_ANSWER_BYTES = 1 << 20
MAX_WAIT_S = 120.0  # a server that asks for more is given up
_MAX_BACKOFF_S = 30.0
_MESSAGE_CHARACTERS = 200
_JPEG_QUALITY = 90
_BUSY = (408, 425, 429)


def load_captioner(config: CaptionConfig, device: str = "cpu") -> Captioner:
    """The one that `config.fallback` names, "endpoint" or "model"; a model computes on `device`."""
    assert config.needs_frames
    return EndpointCaptioner(config) if config.fallback == "endpoint" else ModelCaptioner(config, device)


def _instruction(config: CaptionConfig, num_frames: int) -> str:
    shown = f"These are {num_frames} frames of one video, in order." if num_frames > 1 else "This is one picture."
    return f"{shown} {config.prompt}"


# --- a server -------------------------------------------------------------------------------------------------------


class _TryError(Exception):
    """One try gave no answer.

    Attributes:
        again: whether another may.
        wait_s: what the server asks for before that.
    """

    def __init__(self, message: str, *, again: bool, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.wait_s = again, wait_s


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Gives every response as it is: a redirect, if it were followed, would take the key to another host."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class EndpointCaptioner:
    """Asks `{config.url}/chat/completions`, with the frames as JPEG in data URIs; temperature 0, a fixed seed.

    Args:
        config: with fallback "endpoint".
        sleep: waits so many seconds between tries.

    Raises:
        ValueError: the environment's key cannot be sent.
    """

    def __init__(self, config: CaptionConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        assert config.url is not None
        self.config = config
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._sleep = sleep
        self._opener = urllib.request.build_opener(_AnyStatus)
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE}: must be printable ASCII")

    def describe(self, frames_u8: Video) -> Answer:
        """See `Captioner`. Tries again after 1, 2, 4 ... seconds, less up to a half, or what the server asks for."""
        body = json.dumps(self._request(frames_u8)).encode()
        num_tries = 0
        while True:
            num_tries += 1
            try:
                return self._ask(body)
            except _TryError as failure:
                backoff_s = min(2.0 ** (num_tries - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1)
                if not failure.again or num_tries == self.config.num_tries or failure.wait_s > MAX_WAIT_S:
                    tries = f"try {num_tries} of {self.config.num_tries}"
                    detail = f"{self._url}: {self._shorten(str(failure))} ({tries})"
                    raise ClipRejected(RejectReason.CAPTION_FAILED, detail) from None
                self._sleep(max(failure.wait_s, backoff_s))

    def _request(self, frames_u8: Video) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": _data_uri(frame)}} for frame in frames_u8]
        text = {"type": "text", "text": _instruction(self.config, len(frames_u8))}
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": [*images, text]}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
            "seed": 0,
        }

    def _ask(self, body: bytes) -> Answer:
        headers = {"Content-Type": "application/json", "User-Agent": f"kinoray/{pipeline.__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers)
        deadline_s = time.monotonic() + self.config.timeout_s
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                data = _read(response, deadline_s)
        except (OSError, http.client.HTTPException) as error:
            raise _TryError(f"{type(error).__name__}: {error}", again=True) from error
        if response.status == http.HTTPStatus.OK:
            return _answer(data)
        again = response.status in _BUSY or response.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        said = response.headers.get("Location") or _message(data)
        raise _TryError(f"{response.status} {said}", again=again, wait_s=_retry_after_s(response.headers))

    def _shorten(self, message: str) -> str:
        """On one line, without the key, should the server repeat it."""
        return one_line(message.replace(self._key, "***") if self._key else message)[:_MESSAGE_CHARACTERS]


def _data_uri(frame_u8: Video) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame_u8).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(response: http.client.HTTPResponse, deadline_s: float) -> bytes:
    """The whole body, by the clock: a socket's timeout begins anew with every byte."""
    data = bytearray()
    while part := response.read1(1 << 16):
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            raise _TryError(f"{response.status}, an answer of more than {MAX_ANSWER_BYTES:,} bytes", again=False)
        if time.monotonic() > deadline_s:
            raise TimeoutError("the answer does not end")
    return bytes(data)


def _answer(data: bytes) -> Answer:
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        return Answer("" + text, choice.get("finish_reason") or "stop")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _TryError(f"200, but no chat completion: {_message(data)}", again=True) from None


def _message(data: bytes) -> str:
    """What the server says: {"error": {"message": ...}} as in OpenAI's protocol, or the body."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return data[: 4 * _MESSAGE_CHARACTERS].decode(errors="replace")


def _retry_after_s(headers: http.client.HTTPMessage) -> float:
    """RFC 9110, section 10.2.3: seconds or a date; 0 where there is none."""
    value = headers.get("Retry-After", "0")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


# --- a model --------------------------------------------------------------------------------------------------------


class ModelCaptioner:
    """A vision-language model of transformers, from safetensors; greedy.

    Args:
        config: with fallback "model".
        device: it computes on.

    Raises:
        ValueError: a package or the model is missing.
    """

    def __init__(self, config: CaptionConfig, device: str = "cpu") -> None:
        assert config.model is not None
        self.config = config
        self._processor, self._model = _load(config.model, device)
        self._lock = threading.Lock()

    def describe(self, frames_u8: Video) -> Answer:
        """See `Captioner`; one clip at a time."""
        images = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames_u8]
        text = {"type": "text", "text": _instruction(self.config, len(frames_u8))}
        with self._lock:
            return self._generate([{"role": "user", "content": [*images, text]}])

    def _generate(self, messages: list[dict[str, Any]]) -> Answer:
        settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            inputs = self._processor.apply_chat_template(messages, add_generation_prompt=True, **settings)
        except ValueError as error:  # a picture of a shape that the model does not take
            raise ClipRejected(RejectReason.CAPTION_FAILED, f"{self.config.model}: {one_line(str(error))}") from error
        inputs = inputs.to(self._model.device, self._model.dtype)
        tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=self.config.max_tokens)
        said = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        ends = self._model.generation_config.eos_token_id
        is_whole = len(said) < self.config.max_tokens or said[-1] in (ends if isinstance(ends, list) else [ends])
        return Answer(self._processor.decode(said, skip_special_tokens=True), "stop" if is_whole else "length")


def _load(model: str, device: str) -> tuple[Any, Any]:
    """Processor and model."""
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(model)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", use_safetensors=True)
    except ImportError as error:
        raise ValueError(f"model={model!r} needs packages: pip install 'kinoray[vlm]' ({error})") from error
    except (OSError, ValueError) as error:
        reason = one_line(str(error))[:_MESSAGE_CHARACTERS]
        raise ValueError(f"model={model!r}: cannot be loaded: {reason}") from error
    return processor, loaded.to(device).eval()
