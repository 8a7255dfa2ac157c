"""From what a language model answers to a caption, or to the reason why it is none."""

from __future__ import annotations

import re
from typing import NamedTuple

from pipeline.errors import ClipRejected, RejectReason

_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control codes, and halves of characters
_THOUGHTS = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_PREAMBLE = re.compile(
    r"^\W*(?:(?:sure|certainly|of course)\b[^:]{0,40})?"
    r"(?:here(?:['\u2019]s| is)\b[^:]{0,40}\b)?(?:video )?(?:caption|description)\b(?:[^:.]{0,40}):[\s*]*",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[\"\u201c*`]+([^\"\u201c\u201d*`]+)[\"\u201d*`]+")
_REFUSAL = re.compile(
    r"(?:unfortunately|(?:i['\u2019]m|i am|we are)? ?sorry|as an ai|i apologi[sz]e|"
    r"i (?:can(?:['\u2019]t|not| not)|am (?:unable|not able)|don['\u2019]t|do not)|i['\u2019]m (?:unable|not able))\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?][\"\u201d')]*(?=\s|$)|[\u3002\uff01\uff1f]")  # the last ones are Chinese


class Answer(NamedTuple):
    """What was said.

    Attributes:
        text: raw.
        finish: why it ends: "stop", "length" (at max_tokens) or "content_filter", as OpenAI's protocol names them.
    """

    text: str
    finish: str = "stop"


def accept(answer: Answer, *, min_words: int, max_words: int) -> str:
    """The caption in an answer, on one line.

    Thoughts in <think>, a preamble such as "Here is a caption:" and quotes around it are left out. An answer that ends
    at max_tokens is cut back to its last whole sentence.

    Raises:
        ClipRejected: NO_CAPTION, the answer is empty, a refusal, too short or too long, or has no whole sentence.
    """
    text = one_line(_THOUGHTS.sub("", answer.text))
    text = _PREAMBLE.sub("", text)
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[1].strip()
    if answer.finish == "content_filter" or _REFUSAL.match(text):
        raise ClipRejected(RejectReason.NO_CAPTION, f"refused: {_start(text)}")
    if answer.finish == "length":
        ends = [found.end() for found in _SENTENCE_END.finditer(text)]
        if not ends:
            raise ClipRejected(RejectReason.NO_CAPTION, f"max_tokens ends its first sentence: {_start(text)}")
        text = text[: ends[-1]]
    num_words = len(text.split())
    if not min_words <= num_words <= max_words:
        rule = f"min_words={min_words}, max_words={max_words}"
        raise ClipRejected(RejectReason.NO_CAPTION, f"{num_words} words: {rule}: {_start(text)}")
    return text


def one_line(text: str) -> str:
    """Text without line breaks and without what a table cannot hold."""
    return " ".join(_UNWRITABLE.sub(" ", text).split())


def _start(text: str) -> str:
    return repr(text[:100])
