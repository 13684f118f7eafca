"""A scriptable upstream for OpenAI's chat completions and Responses, Anthropic's Messages, and Gemini.

The text of a request selects the answer, so that every SDK can select it in the same way:

    [cut]    an interrupted answer: a stream ends after its first word, JSON ends in the middle
    [slow]   a stream with a word every tenth of a second, until the caller disconnects
    tools    two parallel tool calls; when the caller sends their results, they become the text of the answer

It reports usage like each provider, and adds it up. `GET /stats` returns the sums.
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
MAX_SLOW_SECONDS = 20


class UpstreamStats:
    """Sums over all requests that the upstream has received."""

    def __init__(self):
        self.lock = threading.Lock()
        self.state = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "disconnects": 0, "words": 0, "faults": []}

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
        if self.path == "/stats":
            return self.send(self.server.stats.snapshot())
        model = {"id": "gpt-4o", "object": "model", "created": 1, "owned_by": "mock"}
        self.send({"object": "list", "data": [model]})

    def do_POST(self):
        stats = self.server.stats
        stats.add(requests=1)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/embeddings"):
            return self.embeddings(body)
        dialect = dialects.dialect_of(self.path.partition("?")[0], body)
        # Azure has the APIs of OpenAI with another header for the key.
        has_azure_key = self.path.startswith("/openai/") and self.headers["api-key"] == KEY
        has_key = has_azure_key or self.headers[dialect.key_header] == dialect.key_value(KEY)
        if not has_key or "key-of" in str(self.headers):
            stats.add(faults=[f"{self.path}: the request does not have the upstream's key, or has another one: {self.headers}"])
        self.script = json.dumps(body)
        if dialect.is_streaming:
            self.stream(dialect)
        else:
            self.whole(dialect)

    def answer(self, dialect):
        """Returns the words, tool calls and usage of the answer."""
        if results := dialect.results():
            return [" and ".join(results)], [], USAGE_OF_RESULTS
        if dialect.has_tools():
            return [], CALLS, USAGE_OF_CALLS
        return TEXT, [], USAGE

    def report(self, usage):
        self.server.stats.add(prompt_tokens=usage[0], completion_tokens=usage[1])

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
            return self.stream_until_disconnect(dialect)
        for word in words:
            self.events(dialect.word(word))
            if "[cut]" in self.script:
                self.close_connection = True
                return
        for index, (name, arguments) in enumerate(calls):
            self.events(dialect.call(index, name, json.dumps(arguments, ensure_ascii=False)))
        self.events(dialect.end(usage))
        # Counted before the last byte is sent, so that a caller with the complete answer sees it in the sums.
        self.report(usage)
        self.wfile.write(b"0\r\n\r\n")

    def stream_until_disconnect(self, dialect):
        deadline = time.monotonic() + MAX_SLOW_SECONDS
        while time.monotonic() < deadline:
            self.server.stats.add(words=1)
            try:
                self.events(dialect.word(" word"))
                readable, _, _ = select.select([self.connection], [], [], 0.1)
                has_disconnected = readable and not self.connection.recv(1, socket.MSG_PEEK)
            except OSError:
                has_disconnected = True
            if has_disconnected:
                self.server.stats.add(disconnects=1)
                break
        self.close_connection = True

    def events(self, events):
        for event in events:
            data = event.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()


class Upstream(ThreadingHTTPServer):
    """A server on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.stats = UpstreamStats()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Ignores errors: the gateway may close a connection at any time."""

    def close(self):
        self.shutdown()
        self.server_close()
