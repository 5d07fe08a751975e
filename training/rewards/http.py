# SPDX-License-Identifier: Apache-2.0
"""A scorer behind a URL: for models whose requirements conflict with ours, or that want a machine of their own.

The wire format. A request is one POST for at most `batch_size` pictures, all 8-bit RGB of one size:

- `json`: type `application/json`, `{"prompts": [text, ...], "images": [base64 of a PNG, ...]}`.
- `npz`: type `application/octet-stream`, a NumPy archive with `images` uint8 `[n, H, W, 3]` and `prompts`, n texts.
  Nothing in it is pickled.

The answer to both is JSON with status 200, `{"scores": [number or null, ...]}`, one per picture in their order; null
(or NaN) says that this picture has none. Any other answer counts as a failure and is tried again after a growing
pause, except a status that blames the request (4xx, but not 408 or 429).

A scorer may die in a run of days: what it fails to score is NaN and counted, never 0, and nothing is raised unless a
limit of failures is set.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image

from training.rewards.base import Samples, batches, check_count, pictures, score_members

ENCODINGS = ("json", "npz")
_TYPES = {"json": "application/json", "npz": "application/octet-stream"}
_TOO_EARLY = (408, 429)
_MOST_BYTES = 1 << 20
_CHUNK = 1 << 16
_log = logging.getLogger(__name__)


class HttpReward:
    """Scores that a server gives.

    Parameters
    ----------
    url: http or https; proxies of the environment apply. encoding: of the request, "json" or "npz".
    batch_size: pictures per request.
    timeout_s: of one try, to connect, to answer and to send the whole answer, each.
    retries: further tries of a request that failed. backoff_s: pause before the first, doubled before every next one.
    max_failures: so many requests in a row that failed, retries included, raise ConnectionError; None for never.
    label: its name in logs.

    Attributes
    ----------
    num_failures: requests that failed for good. num_missing: members that got no score, for whatever reason.
    """

    def __init__(
        self,
        *,
        url: str,
        encoding: str = "json",
        batch_size: int = 16,
        timeout_s: float = 60.0,
        retries: int = 2,
        backoff_s: float = 0.5,
        max_failures: int | None = None,
        label: str = "http",
    ) -> None:
        _check_url(url)
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be positive and finite, got {timeout_s}")
        if not 0 <= backoff_s < math.inf:
            raise ValueError(f"backoff_s must be finite and not negative, got {backoff_s}")
        self.url, self.encoding, self.name = url, encoding, label
        self.batch_size = check_count("batch_size", batch_size)
        self.timeout_s, self.backoff_s = timeout_s, backoff_s
        self.retries = check_count("retries", retries, least=0)
        if max_failures is not None:
            check_count("max_failures", max_failures)
        self.max_failures = max_failures
        self.num_failures = self.num_missing = self._failures_in_a_row = 0

    def __call__(self, samples: Samples) -> torch.Tensor:
        """Raises ConnectionError where the limit of failures in a row is reached, else nothing."""

        def score(members: list[int]) -> torch.Tensor:
            parts = batches(members, self.batch_size)
            scores = [score for part in parts for score in self._score(samples, part)]
            return torch.tensor(scores, dtype=torch.float32)

        out = score_members(samples.finite, score)
        self.num_missing += int((samples.finite & out.isnan()).sum())
        return out

    def _score(self, samples: Samples, members: list[int]) -> list[float]:
        images = pictures(samples.images[members])
        prompts = [samples.prompts[i] for i in members]
        body = (_as_json if self.encoding == "json" else _as_npz)(images, prompts)
        try:
            scores = self._ask(body, len(members))
        except _Failure as failure:
            self._note(failure)
            return [math.nan] * len(members)
        self._failures_in_a_row = 0
        return scores

    def _ask(self, body: bytes, num_scores: int) -> list[float]:
        """Try until there is an answer; the last reason where there is none."""
        pause = self.backoff_s
        for left in range(self.retries, -1, -1):
            try:
                return _parse(self._post(body), num_scores)
            except HTTPError as error:
                error.close()
                failure = _Failure(f"status {error.code}")
                if 400 <= error.code < 500 and error.code not in _TOO_EARLY:
                    break
            except (OSError, HTTPException, ValueError, RecursionError) as error:
                failure = _Failure(f"{type(error).__name__}: {error}")
            if left:
                time.sleep(pause)
                pause *= 2
        raise failure

    def _post(self, body: bytes) -> bytes:
        request = Request(self.url, body, {"Content-Type": _TYPES[self.encoding]})
        with urlopen(request, timeout=self.timeout_s) as response:
            return _read(response, time.monotonic() + self.timeout_s)

    def _note(self, failure: _Failure) -> None:
        self.num_failures += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row == 1:
            _log.warning("reward %r: %s gives no scores (%s)", self.name, self.url, failure)
        if self.max_failures and self._failures_in_a_row >= self.max_failures:
            raise ConnectionError(
                f"reward '{self.name}' must be answered by {self.url}, got {self._failures_in_a_row} failures in a "
                f"row, the last: {failure}"
            ) from failure


class _Failure(Exception):
    """Why a request has no scores."""


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_right = False
    if not is_right or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"url must be of the form http://host:port/path, got {url!r}")


def _as_json(images: Sequence[Image.Image], prompts: Sequence[str]) -> bytes:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return json.dumps({"prompts": list(prompts), "images": encoded}).encode("ascii")


def _as_npz(images: Sequence[Image.Image], prompts: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        images=np.stack([np.asarray(image) for image in images]),
        prompts=np.array(prompts, dtype=np.str_),
    )
    return buffer.getvalue()


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The whole answer. A time-out of the socket alone would not stop one that comes byte by byte."""
    answer = b""
    while chunk := response.read1(_CHUNK):
        answer += chunk
        if len(answer) > _MOST_BYTES:
            raise ValueError(f"answer must have at most {_MOST_BYTES} bytes, got more")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
    return answer


def _parse(answer: bytes, num_scores: int) -> list[float]:
    """Scores of an answer, NaN for null. Raises `ValueError` for anything that is not as documented."""
    content = json.loads(answer)
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or len(scores) != num_scores:
        got = f"{len(scores)} of them" if isinstance(scores, list) else repr(answer[:60])
        raise ValueError(f"answer must hold {num_scores} scores, got {got}")
    return [_number(score) for score in scores]


def _number(score: object) -> float:
    if score is None:
        return math.nan
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise ValueError(f"score must be a number or null, got {score!r}")
    try:
        return float(score)
    except OverflowError:
        raise ValueError("score must be a number that a float can hold, got a longer one") from None
