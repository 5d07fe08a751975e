# SPDX-License-Identifier: Apache-2.0
"""The reward behind a URL, against a real server that answers, fails, hangs, lies and dies."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.rewards import Samples, WeightedSum, make_reward

QUICK = {"backoff_s": 0.0, "timeout_s": 5.0}


class Server(ThreadingHTTPServer):
    """Scores a picture by its mean red, 0..255. `answers` are what it does instead, one per request, then the last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Callable[[Handler, list[float]], None]] = []
        self.seen: list[tuple[np.ndarray, list[str]]] = []
        self.types: list[str] = []
        self.times: list[float] = []
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        server.times.append(time.monotonic())
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.types.append(self.headers["Content-Type"])
        is_json = self.headers["Content-Type"] == "application/json"
        images, prompts = (from_json if is_json else from_npz)(body)
        server.seen.append((images, prompts))
        scores = [float(image[..., 0].mean()) for image in images]
        answers = server.answers
        if not answers:
            self.send(json.dumps({"scores": scores}))
        else:
            (answers.pop(0) if len(answers) > 1 else answers[0])(self, scores)

    def send(self, body: str | bytes, status: int = 200) -> None:
        raw = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def from_json(body: bytes) -> tuple[np.ndarray, list[str]]:
    content = json.loads(body)
    images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in content["images"]]
    return np.stack([np.asarray(image) for image in images]), content["prompts"]


def from_npz(body: bytes) -> tuple[np.ndarray, list[str]]:
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return arrays["images"], arrays["prompts"].tolist()


def correct(handler: Handler, scores: list[float]) -> None:
    handler.send(json.dumps({"scores": scores}))


def says(body: str | bytes, status: int = 200) -> Callable[[Handler, list[float]], None]:
    return lambda handler, _: handler.send(body, status)


def hangs(handler: Handler, _: list[float]) -> None:
    handler.server.stop.wait(20)


def drips(handler: Handler, _: list[float]) -> None:
    """A byte now and then, so that no single read times out."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stop.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hangs_up(handler: Handler, _: list[float]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def babbles(handler: Handler, _: list[float]) -> None:
    handler.wfile.write(b"this is no HTTP\r\n\r\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.stop.set()
    running.shutdown()
    running.server_close()
    thread.join()


def reward(server: Server, **options: Any) -> Any:
    return make_reward("http", url=server.url, **{**QUICK, **options})


def reds(n: int = 5) -> Samples:
    images = torch.zeros(n, 3, 6, 8)
    images[:, 0] = (torch.arange(n) / 255)[:, None, None]
    return Samples(images=images, prompts=[f"red {i}, \u00e9\U0001f600" for i in range(n)])


class TestWire:
    @pytest.mark.parametrize("encoding", ["json", "npz"])
    def test_pictures_and_prompts_arrive_and_scores_come_back_in_order(
        self, server: Server, encoding: str
    ) -> None:
        images = torch.rand(5, 3, 6, 8, generator=torch.Generator().manual_seed(0))
        samples = Samples(images=images, prompts=reds().prompts)
        scorer = reward(server, encoding=encoding, batch_size=2)
        got = scorer(samples)
        pixels = (images * 255).round().permute(0, 2, 3, 1).byte().numpy()
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx([float(p[..., 0].mean()) for p in pixels])
        assert [len(prompts) for _, prompts in server.seen] == [2, 2, 1]
        assert np.array_equal(np.concatenate([x for x, _ in server.seen]), pixels)
        assert [p for _, prompts in server.seen for p in prompts] == list(samples.prompts)
        assert set(server.types) == {
            {"json": "application/json", "npz": "application/octet-stream"}[encoding]
        }
        assert (scorer.num_failures, scorer.num_missing) == (0, 0)

    def test_an_empty_batch_asks_nothing(self, server: Server) -> None:
        assert reward(server)(reds(0)).shape == (0,)
        assert not server.seen

    def test_a_broken_member_is_not_sent(self, server: Server) -> None:
        images = reds(3).images
        images[1, 0, 0, 0] = math.nan
        scorer = reward(server)
        got = scorer(Samples(images=images, prompts=["a", "b", "c"]))
        assert got.isnan().tolist() == [False, True, False]
        assert server.seen[0][1] == ["a", "c"]
        assert scorer.num_missing == 0  # the server owed nothing


class TestMissing:
    @pytest.mark.parametrize("value", ["null", "NaN", "Infinity", "-Infinity", "1e999", "1e39"])
    def test_a_score_that_is_none_is_nan_and_counted(self, server: Server, value: str) -> None:
        server.answers = [says(f'{{"scores": [1, {value}, 3.5]}}')]
        scorer = reward(server)
        got = scorer(reds(3))
        assert got.isnan().tolist() == [False, True, False]
        assert (got[0], got[2]) == (1.0, 3.5)
        assert (scorer.num_missing, scorer.num_failures, len(server.seen)) == (1, 0, 1)

    @pytest.mark.parametrize(
        "answer",
        [
            says("no", 500),
            says("busy", 503),
            says("slow down", 429),
            says('{"scores": [1, 2]}'),
            says('{"scores": [1, 2, 3, 4]}'),
            says('{"scores": [1, 2, "3"]}'),
            says('{"scores": [1, 2, true]}'),
            says('{"scores": [1, 2, [3]]}'),
            says(f'{{"scores": [1, 2, {"9" * 400}]}}'),
            says(f'{{"scores": [1, 2, {"9" * 5000}]}}'),
            says('{"scores": {"0": 1}}'),
            says('{"score": [1, 2, 3]}'),
            says("[1, 2, 3]"),
            says("null"),
            says(""),
            says("<html>it works</html>"),
            says(b"\xff\xfe\x00garbage"),
            says("[" * 100_000),
            says('{"scores": [1, 2, 3]}' + " " * (1 << 21)),
            hangs_up,
            babbles,
        ],
    )
    def test_a_bad_answer_is_tried_again_and_then_missing(
        self, server: Server, answer: Callable[..., None]
    ) -> None:
        server.answers = [answer]
        scorer = reward(server, retries=2)
        assert scorer(reds(3)).isnan().all()
        assert (scorer.num_missing, scorer.num_failures, len(server.seen)) == (3, 1, 3)

    @pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
    def test_a_request_that_is_refused_is_not_repeated(self, server: Server, status: int) -> None:
        server.answers = [says("no", status)]
        scorer = reward(server, retries=2)
        assert scorer(reds(3)).isnan().all()
        assert (scorer.num_missing, scorer.num_failures, len(server.seen)) == (3, 1, 1)

    @pytest.mark.parametrize("answer", [hangs, drips])
    def test_a_server_that_hangs_costs_no_more_than_the_time_out(
        self, server: Server, answer: Callable[..., None]
    ) -> None:
        server.answers = [answer]
        scorer = reward(server, retries=1, timeout_s=0.3)
        start = time.monotonic()
        assert scorer(reds(3)).isnan().all()
        assert time.monotonic() - start < 5
        assert (scorer.num_missing, scorer.num_failures, len(server.seen)) == (3, 1, 2)

    def test_a_server_that_recovers_is_heard(self, server: Server) -> None:
        server.answers = [says("", 500), says("garbage"), correct]
        scorer = reward(server, retries=2)
        assert scorer(reds(3)).tolist() == [0.0, 1.0, 2.0]
        assert (scorer.num_missing, scorer.num_failures) == (0, 0)

    def test_the_pauses_double(self, server: Server) -> None:
        server.answers = [says("", 500)]
        reward(server, retries=2, backoff_s=0.1)(reds(1))
        first, second = np.diff(server.times)
        assert first >= 0.1
        assert second >= 0.2

    def test_one_failed_batch_leaves_the_others_alone(self, server: Server) -> None:
        server.answers = [correct, says("", 500), correct]
        scorer = reward(server, retries=0, batch_size=2)
        got = scorer(reds(5))
        assert got.isnan().tolist() == [False, False, True, True, False]
        assert got[4] == 4.0
        assert (scorer.num_missing, scorer.num_failures) == (2, 1)

    def test_a_missing_member_has_no_sum(self, server: Server) -> None:
        server.answers = [says('{"scores": [null, 2]}')]
        samples = Samples(images=reds(2).images, prompts=["a", "b"], full=reds(2).images)
        total = WeightedSum({reward(server): 1.0, make_reward("mse", to="full"): 1.0})
        assert total(samples).isnan().tolist() == [True, False]


class TestOutage:
    def test_a_server_that_dies_in_a_run_raises_nothing_and_is_logged_once(
        self, server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        scorer = reward(server, retries=1)
        assert scorer(reds(3)).isfinite().all()
        server.shutdown()
        server.server_close()
        with caplog.at_level(logging.WARNING):
            assert scorer(reds(3)).isnan().all()
            assert scorer(reds(3)).isnan().all()
        assert (scorer.num_missing, scorer.num_failures) == (6, 2)
        assert len(caplog.records) == 1
        assert server.url in caplog.text

    def test_the_limit_of_failures_in_a_row_is_one_clear_error(self, server: Server) -> None:
        server.answers = [says("", 503)]
        scorer = reward(server, retries=0, max_failures=3)
        assert scorer(reds(1)).isnan().all()
        assert scorer(reds(1)).isnan().all()
        with pytest.raises(
            ConnectionError, match=rf"^reward 'http' must be .*{server.url}, got 3 .*: status 503$"
        ):
            scorer(reds(1))

    def test_an_answer_ends_the_row(self, server: Server) -> None:
        server.answers = [says("", 500), correct, says("", 500), correct]
        scorer = reward(server, retries=0, max_failures=2)
        got = torch.cat([scorer(reds(1)) for _ in range(5)])
        assert got.isnan().tolist() == [True, False, True, False, False]


class TestOptions:
    @pytest.mark.parametrize(
        "url",
        [
            "file:///etc/passwd",
            "ftp://host/x",
            "host:80/x",
            "http://",
            "http://host:port/",
            "http://host:0/",
            "http://a host/",
            "http://host/\n",
            "",
        ],
    )
    def test_a_url_is_of_http(self, url: str) -> None:
        with pytest.raises(ValueError, match="url must be of the form http://host:port/path, got"):
            make_reward("http", url=url)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("encoding", "pickle"),
            ("batch_size", 0),
            ("batch_size", True),
            ("timeout_s", 0),
            ("timeout_s", math.nan),
            ("timeout_s", math.inf),
            ("retries", -1),
            ("backoff_s", -1),
            ("backoff_s", math.nan),
            ("max_failures", 0),
        ],
    )
    def test_a_wrong_option_is_named(self, option: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"^{option} must be "):
            make_reward("http", **{"url": "http://host/x", option: value})

    def test_two_scorers_are_logged_under_their_own_names(self, server: Server) -> None:
        total = WeightedSum({reward(server, label="ocr"): 1.0, reward(server, label="vlm"): 2.0})
        assert total(reds(2)).tolist() == [0.0, 3.0]
        assert set(total.terms(reds(2))) == {"ocr", "vlm"}
