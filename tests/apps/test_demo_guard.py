"""The demo's server as another site's page, or a program, sees it: it answers its own pages only,
and nothing that it is sent leaves a traceback in its log."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("nicegui")

from translution.apps.demo.guard import OwnPagesOnly, names_of, numbers
from translution.apps.demo.listening import listen
from translution.apps.demo.models import weights_folder

MODELS = [weights_folder() / name for name in ("digits-moved-attention", "text-attention")]
POLLING = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"


class Server:
    """The command in a process of its own."""

    def __init__(self):
        runs = [str(path) for path in MODELS]
        code = "from translution.apps.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "demo", "--no-open", "--port=0", *runs],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        self.process.stdout.readline()
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])
        self.host = f"127.0.0.1:{self.port}"
        self.log: list[str] = []
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self.reader.start()

    def request(self, method="GET", path="/", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        for name, value in ({"Host": self.host} | headers).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        content = reply.read().decode()
        connection.close()
        return reply.status, dict(reply.getheaders()), content

    def end(self):
        """Its exit code, and what it wrote to standard error."""
        try:
            self.process.send_signal(signal.SIGINT)
            code = self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.reader.join(20)
            self.process.stdout.close()
            self.process.stderr.close()
        return code, "".join(self.log)


@pytest.fixture(scope="module")
def server():
    """One for all tests; whatever they send, its log has short lines and no traceback."""
    made = Server()
    yield made
    code, log = made.end()
    assert code == 130
    assert not re.search(r"^(Traceback|  File)", log, re.M), log
    assert all(len(line) < 400 for line in log.splitlines())


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Host": "localhost:1"}, 200),  # the port of a tunnel
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 200),  # a link
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:{port}"}, 403),
        ({"Host": "8.8.8.8:{port}"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "["}, 403),
        ({"Host": "evil.example@127.0.0.1:{port}"}, 403),
        ({"Host": "127.0.0.1/evil.example"}, 403),
        ({"Host": "127.0.0.1:evil"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),  # another port is another site
        ({"Origin": "http://localhost:{port}"}, 403),  # it is not the host of the request
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port
    ],
)
def test_only_its_own_pages_are_answered(server, headers, code):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    for path in ("/", POLLING):
        found, answered, _ = server.request(path=path, **headers)
        assert found == code, path
        allowed = {name.lower(): value for name, value in answered.items()}
        origin = allowed.get("access-control-allow-origin")
        assert origin in (None, headers.get("Origin") if code == 200 else None)
        if code == 200:
            assert allowed["content-security-policy"] == "frame-ancestors 'none'"
    wanted = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    found = server.request(path=POLLING.replace("polling", "websocket"), **wanted | headers)[0]
    assert found == (101 if code == 200 else 403)


def test_other_machines_call_it_by_an_address():
    with listen("0.0.0.0", 0) as every:
        guard = OwnPagesOnly(lambda *_: None, names_of(every, "0.0.0.0"), True)
        assert guard._is_named("192.168.1.7")
        assert guard._is_named("fe80::1")
        assert not guard._is_named("evil.example")
    with listen("127.0.0.1", 0) as one:
        assert "evil.example" not in names_of(one, "127.0.0.1")
        assert "me.local" in names_of(one, "ME.local")


HOSTILE = [
    None, True, -1, 1e308, "x", "9" * 3000, [], [[[]]], {}, {"stamp": {}}, {"patch": None},
    {"stamp": 0, "row": "a", "column": []}, {"stamp": 1e300, "row": 1, "column": 1},
    {"blank": 0, "lines": {"a": {"b": 1}}}, {"blank": 0, "lines": None},
    {"blank": 0, "lines": [[["a", "b"]]]}, {"value": 99, "label": []}, {"blank": [], "lines": []},
]  # fmt: skip


def test_hostile_events_leave_no_traceback(server):
    assert server.log == []  # nothing before was worth a line
    _, _, page = server.request()
    client = re.search(r"client_id': '([0-9a-f-]+)'", page)[1]
    _, *parts = re.split(r'"(\d+)":\{"tag"', page)
    listeners = [
        (int(number), found)
        for number, element in zip(parts[::2], parts[1::2], strict=True)
        for found in re.findall(r'"listener_id":"([0-9a-f-]+)"', element)
    ]
    assert len(listeners) > 20
    _, _, opened = server.request(path=POLLING)
    session = f"{POLLING}&sid={json.loads(opened[1:])['sid']}"

    def send(*packets):
        for packet in packets:
            server.request("POST", session, packet.encode())

    def event(name, *content):
        return "42" + json.dumps([name, *content])

    send("40", event("handshake", {
        "client_id": client, "tab_id": "1", "document_id": "1", "next_message_id": 0,
        "old_tab_id": None,
    }))  # fmt: skip
    for number, listener in listeners:
        content = {"client_id": client, "id": number, "listener_id": listener}
        packets = [event("event", content | {"args": [json.dumps(sent)]}) for sent in HOSTILE]
        for first in range(0, len(packets), 9):  # at most 16 are read at once
            send("\x1e".join(packets[first : first + 9]))
    send(event("event", None), event("event", {"client_id": client}), event("ack", 3))
    send(event("event", {"client_id": client, "id": 1, "listener_id": "x", "args": ["{"]}))
    send(event("log", {"client_id": client, "level": "error", "message": "a\nTraceback"}))
    send(event("nothing", {}), event("handshake", {}), event("handshake"), "4", "42[", "9")
    assert server.request()[0] == 200  # it still answers
    late = time.monotonic() + 20
    while not any("in _event_args_to_value" in line for line in list(server.log)):
        assert time.monotonic() < late, "the events have not come through to NiceGUI's elements"
        time.sleep(0.05)


def test_numbers_of_an_event():
    assert numbers({"row": 1.0, "column": 2}, "row", "column") == [1, 2]
    for sent in (None, 3, [], {"row": 1}, {"row": "1", "column": 2}, {"row": float("nan")}):
        assert numbers(sent, "row", "column") is None
