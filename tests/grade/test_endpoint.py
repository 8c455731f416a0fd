"""The endpoint grader against a real HTTP server on this machine."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import diskcache
import pytest

from seal_jax.config import GradeConfig
from seal_jax.errors import SealError
from seal_jax.grade import endpoint
from seal_jax.grade.base import GradeItem, item_prompt

STALL = 20.0  # seconds; far beyond every timeout here, and cut short when the server stops


def completion(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }


class Server:
    """Answers with what `script` returns for (number of the request, its body): text for a chat reply, a (status, body) or (status, body,
    headers) tuple, "STALL", "DRIBBLE" or "CLOSE"."""

    def __init__(self, script):
        self.script, self.bodies, self.keys = script, [], []
        self.now = self.peak = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.keys.append(self.headers["authorization"])
                    outer.now += 1
                    outer.peak = max(outer.peak, outer.now)
                try:
                    self.answer(outer.script(number, body))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer.lock:
                        outer.now -= 1

            def answer(self, reply):
                if reply == "CLOSE":
                    self.close_connection = True
                    return
                if reply == "STALL":
                    outer.over.wait(STALL)
                    self.close_connection = True
                    return
                if reply == "DRIBBLE":  # a byte now and then: never silent for long, and never done
                    self.send_response(200)
                    self.send_header("content-length", "100000")
                    self.end_headers()
                    while not outer.over.wait(0.05):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                    return
                status, body, *headers = (200, completion(reply)) if isinstance(reply, str) else reply
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def stop(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEAL_CACHE", str(tmp_path / "default"))
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve():
    servers = []

    def start(script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        if not server.over.is_set():
            server.stop()


@pytest.fixture
def grader(tmp_path):
    def make(server, **more):
        config = {"retries": 2, "timeout": 5.0, "concurrency": 4, "cache": str(tmp_path / "replies")} | more
        return endpoint.EndpointGrader(GradeConfig(name="endpoint", base_url=server.url, model="m", **config))

    return make


def item(prediction="red"):
    return GradeItem("Kites", "Which colour?", "red", prediction)


def by_prediction(replies):
    """A script that looks at the student's answer alone."""
    return lambda _, body: next(v for k, v in replies.items() if f"Student answer: {k}\n" in body["messages"][0]["content"])


def test_asks_and_reads_verdicts(serve, grader, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(by_prediction({"red": "Yes.", "blue": "no"}))
    assert grader(server).grade([item("red"), item("blue"), item(" \n"), item("red")]) == [True, False, False, True]
    assert len(server.bodies) == 2  # nothing is asked twice, and nothing about a blank
    body = next(b for b in server.bodies if "Student answer: red" in b["messages"][0]["content"])
    assert body["messages"] == [{"role": "user", "content": item_prompt(item("red"))}]
    assert (body["model"], body["temperature"]) == ("m", 0.0)
    assert set(server.keys) == {"Bearer secret"}


PASSING = [(500, {}), (503, b"busy"), (429, {}), (200, b"{junk")]


@pytest.mark.parametrize("reply", ["yes", "Hello there.", (200, completion(None)), *PASSING], ids=str)
def test_a_server_that_is_there_passes_the_check(serve, grader, reply, caplog):
    server = serve(lambda *_: reply)
    grader(server).check()
    assert len(server.bodies) == 1 and server.bodies[0]["model"] == "m"
    assert ["did not grade a first question" in m for m in caplog.messages] == [True] * (reply in PASSING)


def test_a_slow_server_passes_the_check(serve, grader, caplog):
    grader(serve(lambda *_: "STALL"), timeout=0.3).check()
    assert "no reply within 0.3 s" in caplog.text


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((401, {"error": {"message": "bad key"}}), r"key refused \(status 401\): bad key; check OPENAI_API_KEY"),
        ((403, {}), r"key refused \(status 403\)"),
        ((404, {"error": {"message": "no such model"}}), r"unknown model 'm' or address \(status 404\): no such model; check grade.model"),
        ((400, {"error": {"message": "no max_tokens"}}), r"refuses to grade \(status 400\): no max_tokens"),
        ("CLOSE", "cannot be reached"),
    ],
    ids=str,
)
def test_a_server_that_will_never_grade_fails_the_check(serve, grader, reply, said):
    server = serve(lambda *_: reply)
    with pytest.raises(SealError, match=said) as error:
        grader(server).check()
    assert server.url in str(error.value) and "\n" not in str(error.value)


def test_without_a_server_the_check_fails_and_a_short_outage_passes_it(serve, grader):
    server = serve(lambda number, _: "CLOSE" if number < 2 else "yes")
    grader(server).check()
    server.stop()
    with pytest.raises(
        SealError, match=rf"grade.name=endpoint: {server.url} cannot be reached \(.*\); start the server, or check grade.base_url"
    ):
        grader(server).check()


def test_replies_are_cached_by_prompt_model_and_server(serve, grader):
    server, other = serve(lambda *_: "yes"), serve(lambda *_: "no")
    first = grader(server)
    assert first.grade([item()]) == [True]
    assert first.grade([item()]) == grader(server).grade([item()]) == [True]
    assert len(server.bodies) == 1
    assert grader(other).grade([item()]) == [False]
    another = grader(server)
    another.model = "n"
    another.grade([item()])
    assert [b["model"] for b in server.bodies] == ["m", "n"]


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {"error": {"message": "broken"}}),
        (503, b"<html>busy</html>"),
        (429, {"error": {"message": "slow down"}}, {"retry-after": "0.02"}),
        (408, {}),
        (409, {}),
        (200, b"{junk"),
        (200, b"[1, 2]"),
        (200, b'"text"'),
        (200, b"null"),
        (200, {"choices": []}),
        (200, {"choices": None}),
        (200, {"choices": [{"message": {"content": {"a": 1}}}]}),
        (200, {"error": {"message": "overloaded"}}),
        "CLOSE",
    ],
    ids=str,
)
def test_passing_trouble_is_tried_again(serve, grader, trouble, caplog):
    server = serve(lambda number, _: trouble if number < 2 else "yes")
    g = grader(server)
    assert g.grade([item()]) == [True]
    assert (len(server.bodies), g.requests, g.failures) == (3, 3, 0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ((500, {"error": {"message": "broken"}}), "status 500: broken"),
        ((429, {"error": {"message": "quota"}}), "status 429: quota"),
        ((200, b"{junk"), "not a chat completion"),
        ((200, {"choices": []}), "not a chat completion"),
        ("CLOSE", "connection failed"),
    ],
    ids=str,
)
def test_lasting_trouble_is_ungraded_counted_and_not_cached(serve, grader, caplog, trouble, reason):
    server = serve(lambda *_: trouble)
    g = grader(server, retries=1, patience=0.0)
    with caplog.at_level(logging.WARNING):
        assert g.grade([item("red"), item("blue"), item("")]) == [None, None, False]
    assert len(server.bodies) == 4 and g.failures == 2
    (record,) = caplog.records
    assert "2 of 3 answers stay ungraded" in record.getMessage() and reason in record.getMessage()
    server.script = lambda *_: "yes"
    assert g.grade([item("red")]) == [True]


@pytest.mark.parametrize("trouble", ["CLOSE", (429, {}), (502, {}), (503, b"<html>busy</html>"), (504, {})], ids=str)
def test_an_outage_is_waited_for(serve, grader, caplog, trouble):
    server = serve(lambda number, _: trouble if number < 9 else "yes")  # no more than four at once
    g = grader(server, retries=0)
    assert g.grade([item(str(i)) for i in range(6)]) == [True] * 6
    assert g.failures == 0 and len(server.bodies) <= 24
    gone, back = caplog.messages
    assert f"{server.url} answers nobody" in gone and "at most 600 s" in gone and "answers again, after" in back


def test_an_outage_that_lasts_stops_the_run(serve, grader):
    server = serve(lambda number, _: "yes" if number < 3 else "CLOSE")
    items = [item(str(i)) for i in range(9)]
    with pytest.raises(
        SealError,
        match=rf"{server.url}: has answered nobody for \d+ s \(connection failed: .*give the same command again \(grade.patience: ",
    ) as error:
        grader(server, retries=0, concurrency=1, patience=0.3).grade(items)
    assert "\n" not in str(error.value)
    server.script = lambda *_: "no"
    assert grader(server).grade(items) == [True] * 3 + [False] * 6


@pytest.mark.parametrize("others", [["blue"], []], ids=["others get replies", "nobody else asks"])
def test_a_prompt_that_the_server_hangs_up_on_is_no_outage(serve, grader, caplog, others):
    server = serve(lambda _, body: "CLOSE" if "Student answer: green\n" in body["messages"][0]["content"] else "yes")
    g = grader(server, retries=1)
    assert g.grade([item("green"), *map(item, others)]) == [None] + [True] * len(others)
    assert g.failures == 1 and "connection failed" in caplog.text and "answers nobody" not in caplog.text


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("As a reader I cannot tell.", "no yes or no in the reply"),
        ("", "no yes or no in the reply"),
        ((200, completion(None, "content_filter")), "no yes or no in the reply"),
        ((400, {"error": {"message": "too long"}}), "status 400: too long"),
        ((422, {"detail": "odd"}), "status 422"),
    ],
    ids=str,
)
def test_what_would_not_change_is_not_tried_again(serve, grader, caplog, reply, reason):
    server = serve(by_prediction({"red": reply, "blue": "yes"}))
    g = grader(server)
    assert g.grade([item("red"), item("blue")]) == [None, True]
    assert (len(server.bodies), g.failures) == (2, 1)
    assert reason in caplog.text
    assert g.grade([item("red"), item("blue")]) == [None, True]
    assert len(server.bodies) == 3  # only the usable reply was kept


@pytest.mark.parametrize("trouble", ["STALL", "DRIBBLE"])
def test_a_try_ends_at_its_timeout(serve, grader, trouble):
    server = serve(lambda number, _: trouble if number == 0 else "yes")
    start = time.monotonic()
    assert grader(server, timeout=0.4).grade([item()]) == [True]
    assert 0.4 <= time.monotonic() - start < 5.0


def test_stalling_for_good_is_ungraded(serve, grader, caplog):
    server = serve(lambda *_: "STALL")
    g = grader(server, timeout=0.4, retries=1)
    assert g.grade([item()]) == [None]
    assert g.requests == 2 and g.failures == 1 and "no reply within 0.4 s (2 tries)" in caplog.text


def test_pauses_grow_and_obey_the_server(serve, grader, monkeypatch):
    pauses = []
    sleep = asyncio.sleep

    async def record(seconds, *args):
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(endpoint.asyncio, "sleep", record)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 1.0)
    headers = [{}, {}, {}, {"retry-after": "7"}, {"retry-after": "9999"}, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}]
    server = serve(lambda number, _: (429, {}, headers[number]) if number < len(headers) else "yes")
    assert grader(server, retries=6).grade([item()]) == [True]
    pauses = [p for p in pauses if p]  # the client's own switches of task are sleeps of 0
    for pause, middle in zip(pauses, [1, 2, 4, 7, endpoint.LONGEST_PAUSE, endpoint.LONGEST_PAUSE], strict=True):
        assert 0.75 * middle <= pause <= 1.25 * middle


@pytest.mark.parametrize(("status", "expected"), [(401, "check OPENAI_API_KEY"), (403, "check OPENAI_API_KEY"), (404, "unknown model 'm'")])
def test_what_no_item_can_survive_stops_the_run(serve, grader, status, expected):
    server = serve(lambda *_: (status, {"error": {"message": "go\naway"}}))
    with pytest.raises(SealError) as error:
        grader(server).grade([item(str(i)) for i in range(50)])
    assert expected in str(error.value) and "go away" in str(error.value) and "\n" not in str(error.value)
    assert len(server.bodies) <= 4  # those that were in flight


def test_replies_before_a_stop_are_kept(serve, grader):
    server = serve(lambda number, _: "yes" if number < 3 else (401, {}))
    items = [item(str(i)) for i in range(5)]
    with pytest.raises(SealError):
        grader(server, concurrency=1).grade(items)
    server.script = lambda *_: "no"
    assert grader(server, concurrency=1).grade(items) == [True, True, True, False, False]


def test_replies_before_ctrl_c_are_kept(serve, grader):
    def script(number, _):
        if number < 3:
            return "yes"
        os.kill(os.getpid(), signal.SIGINT)
        return "STALL"

    server = serve(script)
    items = [item(str(i)) for i in range(5)]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grader(server, concurrency=1, timeout=15.0).grade(items)
    assert time.monotonic() - start < 10.0
    server.script = lambda *_: "no"
    assert grader(server).grade(items) == [True, True, True, False, False]


def test_concurrency_is_used_and_bounded(serve, grader):
    def script(*_):
        time.sleep(0.05)
        return "yes"

    server = serve(script)
    assert grader(server, concurrency=3).grade([item(str(i)) for i in range(12)]) == [True] * 12
    assert server.peak == 3


def test_batches_are_graded_while_others_are_made(serve, grader):
    """`begin` does not wait; what it returns does. A second batch stands in line, and does not double the calls in flight."""
    gate = threading.Event()

    def script(*_):
        gate.wait(STALL)
        return "yes"

    server = serve(script)
    g = grader(server, concurrency=2)
    batches = [g.begin([item(f"{batch} {i}") for i in range(4)] + [item(" ")]) for batch in range(2)]
    for _ in range(500):  # both connections have come
        if server.now == 2:
            break
        time.sleep(0.01)
    assert server.now == 2
    gate.set()
    assert [wait() for wait in batches] == [[True] * 4 + [False]] * 2
    assert server.peak == 2 and len(server.bodies) == 8


def test_what_stops_a_run_is_raised_where_it_is_waited_for(serve, grader):
    wait = grader(serve(lambda *_: (401, {}))).begin([item()])
    with pytest.raises(SealError, match="OPENAI_API_KEY"):
        wait()


def test_works_inside_a_running_loop(serve, grader):
    server = serve(lambda *_: "yes")

    async def notebook():
        return grader(server).grade([item()])

    assert asyncio.run(notebook()) == [True]


def test_nothing_listens(grader, caplog):
    server = Server(lambda *_: "yes")
    server.stop()
    g = grader(server, retries=1, patience=0.0)
    assert g.grade([item()]) == [None]
    assert "connection failed" in caplog.text and g.requests == 2


def test_cache_serves_several_processes(serve, tmp_path):
    """Two processes open one new cache folder at once and grade the same items; a third finds every reply there."""
    server = serve(lambda *_: "yes")
    code = (
        "import sys\n"
        "from seal_jax.config import GradeConfig\n"
        "from seal_jax.grade import base, endpoint\n"
        "g = endpoint.EndpointGrader(GradeConfig(base_url=sys.argv[1], model='m', cache=sys.argv[2]))\n"
        "v = g.grade([base.GradeItem('Kites', 'Which colour?', 'red', str(i)) for i in range(20)])\n"
        "assert v == [True] * 20, v\n"
    )
    command = [sys.executable, "-c", code, server.url, str(tmp_path / "shared")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    asked = len(server.bodies)
    assert 20 <= asked <= 40
    config = GradeConfig(base_url=server.url, model="m", cache=str(tmp_path / "shared"))
    assert endpoint.EndpointGrader(config).grade([item(str(i)) for i in range(20)]) == [True] * 20
    assert len(server.bodies) == asked


def test_unusable_entries_of_the_cache_are_asked_again(serve, grader):
    server = serve(lambda *_: "yes")
    g = grader(server)
    g._cache.set(g._entry(item_prompt(item())), "perhaps")
    assert g.grade([item()]) == [True]
    assert len(server.bodies) == 1


def test_cache_folder_that_cannot_be(serve, grader, tmp_path):
    server = serve(lambda *_: "yes")
    (tmp_path / "file").write_text("")
    with pytest.raises(SealError, match="cache of replies cannot be used"):
        grader(server, cache=str(tmp_path / "file" / "sub"))


def test_a_full_disk_is_one_clear_line(serve, grader, monkeypatch):
    def full(*args, **kwargs):
        raise diskcache.core.sqlite3.OperationalError("database or disk is full")

    server = serve(lambda *_: "yes")
    g = grader(server)
    monkeypatch.setattr(diskcache.Cache, "set", full)
    with pytest.raises(SealError, match=r"replies.*disk is full.*free space there or set grade\.cache"):
        g.grade([item()])


def test_settings_from_the_environment(serve, monkeypatch, tmp_path):
    server = serve(lambda *_: "yes")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    g = endpoint.EndpointGrader(GradeConfig(name="endpoint"))
    assert g.base_url == server.url and g.grade([item()]) == [True]
    assert (tmp_path / "default" / "grade" / "cache.db").is_file()
    chosen = GradeConfig(name="endpoint", base_url="http://127.0.0.1:9/v1/")
    assert endpoint.EndpointGrader(chosen).base_url == "http://127.0.0.1:9/v1"


def test_default_server_needs_a_key(monkeypatch):
    with pytest.raises(SealError, match="OPENAI_API_KEY"):
        endpoint.EndpointGrader(GradeConfig(name="endpoint"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert endpoint.EndpointGrader(GradeConfig(name="endpoint")).base_url == endpoint.DEFAULT_URL


def test_bad_settings():
    with pytest.raises(SealError, match="http://"):
        endpoint.EndpointGrader(GradeConfig(name="endpoint", base_url="localhost:8000"))
    with pytest.raises(SealError, match=r"grade\.timeout"):
        endpoint.EndpointGrader(GradeConfig(name="endpoint", base_url="http://127.0.0.1:9", timeout=0.0))
