"""A scriptable upstream: it speaks OpenAI's chats and Responses, Anthropic's Messages and Gemini's contents.

What it answers is decided by the request's text, so that every SDK can ask for it in the same way:

    [cut]    the answer breaks off: a stream after its first word, JSON in its middle
    [slow]   a stream that goes on, a word each tenth of a second, until the caller hangs up
    tools    two calls of them in parallel; their results, sent back, become the answer's text

It reports usage as each provider does, and keeps account of it. `GET /account` shows the account.
"""

import json
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dialects

KEY = "sk-of-the-upstream"
TEXT = ["Hello", " there"]
USAGE = (20, 5)
CALLS = [("weather", {"city": "Zürich", "days": 3}), ("weather", {"city": "São \"Paulo\"", "days": 1})]
USAGE_OF_CALLS = (31, 9)
USAGE_OF_RESULTS = (47, 6)
SLOWEST = 20


class Account:
    """What the upstream has seen. Streams are counted when their head is sent."""

    def __init__(self):
        self.lock = threading.Lock()
        self.state = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "hangups": 0, "words": 0, "faults": []}

    def add(self, **amounts):
        with self.lock:
            for name, amount in amounts.items():
                self.state[name] += amount

    def snapshot(self):
        with self.lock:
            return dict(self.state, faults=list(self.state["faults"]))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/account":
            return self.send(self.server.account.snapshot())
        model = {"id": "gpt-4o", "object": "model", "created": 1, "owned_by": "mock"}
        self.send({"object": "list", "data": [model]})

    def do_POST(self):
        account = self.server.account
        account.add(requests=1)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/embeddings"):
            return self.embeddings(body)
        dialect = dialects.of(self.path, body)
        if self.headers[dialect.key_header] != dialect.key_value(KEY) or "key-of" in str(self.headers):
            account.add(faults=[f"{self.path}: the upstream's own key was not sent, or another was: {self.headers}"])
        self.script = json.dumps(body)
        if dialect.streams:
            self.stream(dialect)
        else:
            self.whole(dialect)

    def answer(self, dialect):
        """Words, calls and usage of the answer."""
        if results := dialect.results():
            return [" and ".join(results)], [], USAGE_OF_RESULTS
        if dialect.has_tools():
            return [], CALLS, USAGE_OF_CALLS
        return TEXT, [], USAGE

    def report(self, usage):
        self.server.account.add(prompt_tokens=usage[0], completion_tokens=usage[1])

    def embeddings(self, body):
        data = [{"object": "embedding", "index": i, "embedding": [0.5, -0.25]} for i in range(len(body["input"]))]
        self.report((USAGE[0], 0))
        usage = {"prompt_tokens": USAGE[0], "total_tokens": USAGE[0]}
        self.send({"object": "list", "data": data, "model": body["model"], "usage": usage})

    def whole(self, dialect):
        words, calls, usage = self.answer(dialect)
        answer = dialect.whole("".join(words), calls, usage)
        if "[cut]" in self.script:
            return self.send(answer, cut=True)
        self.report(usage)
        self.send(answer)

    def send(self, value, cut=False):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def stream(self, dialect):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        words, calls, usage = self.answer(dialect)
        self.events(dialect.begin(usage))
        if "[slow]" in self.script:
            return self.go_on_until_hung_up(dialect)
        for word in words:
            self.events(dialect.word(word))
            if "[cut]" in self.script:
                self.close_connection = True
                return
        for index, (name, arguments) in enumerate(calls):
            self.events(dialect.call(index, name, json.dumps(arguments, ensure_ascii=False)))
        self.events(dialect.end(usage))
        # Before the last byte, so that whoever has that sees it in the account.
        self.report(usage)
        self.wfile.write(b"0\r\n\r\n")

    def go_on_until_hung_up(self, dialect):
        deadline = time.monotonic() + SLOWEST
        while time.monotonic() < deadline:
            self.server.account.add(words=1)
            try:
                self.events(dialect.word(" word"))
                readable, _, _ = select.select([self.connection], [], [], 0.1)
                hung_up = readable and not self.connection.recv(1, socket.MSG_PEEK)
            except OSError:
                hung_up = True
            if hung_up:
                self.server.account.add(hangups=1)
                break
        self.close_connection = True

    def events(self, events):
        for event in events:
            data = event.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()


class Upstream(ThreadingHTTPServer):
    """Serves on a free port of this machine until it is closed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.account = Account()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A connection that the gateway has closed is no news."""

    def close(self):
        self.shutdown()
        self.server_close()
