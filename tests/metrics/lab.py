"""Redis, gateways, a mock upstream and Prometheus for the tests of the metrics. Each listens on a free port of this machine."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from port import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "config/prometheus"
WAIT_SECONDS = 20


def request(url, body=None, method=None, key=None, timeout=10):
    """Returns the status and the text of an answer."""
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(call, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_until(what, is_true, seconds=WAIT_SECONDS):
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = is_true()
        except OSError:
            found = None
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out: {what}")
        time.sleep(0.1)


class Backend(BaseHTTPRequestHandler):
    """An upstream. Words in the prompt select the answer: `stream`, `broken`, `mute` (no usage), `slow`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if "slow" in body:
            time.sleep(0.2)
        if "broken" in body:
            return self.answer(500, {"error": {"message": "broken"}})
        usage = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
        if '"stream": true' in body:
            return self.stream(usage)
        message = {"role": "assistant", "content": "Hello there"}
        answer = {"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        self.answer(200, answer if "mute" in body else answer | {"usage": usage})

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for kind, limit, left in [("requests", 500, 400), ("tokens", 90_000, 60_000)]:
            self.send_header(f"x-ratelimit-limit-{kind}", str(limit))
            self.send_header(f"x-ratelimit-remaining-{kind}", str(left))
            self.send_header(f"x-ratelimit-reset-{kind}", "6s")
        self.end_headers()
        self.wfile.write(data)

    def stream(self, usage):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        deltas = [{"choices": [{"index": 0, "delta": {"content": f"word {n} "}}]} for n in range(5)]
        try:
            for event in [*deltas, {"choices": [], "usage": usage}]:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.02)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # the gateway has disconnected


class Lab:
    """Everything that a test starts. `close` ends it."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.processes = []
        self.backend = ThreadingHTTPServer(("127.0.0.1", 0), Backend)
        self.backend.daemon_threads = True
        threading.Thread(target=self.backend.serve_forever, daemon=True).start()

    def close(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.backend.shutdown()
        self.backend.server_close()

    def start(self, command, name):
        with open(self.folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        self.processes.append(process)
        return process

    def redis(self):
        """Starts a Redis server, and returns its URL."""
        port = free_port()
        options = ["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self.start(["redis-server", "--port", str(port), *options], f"redis-{port}")

        def answers():
            with socket.create_connection(("127.0.0.1", port), 1):
                return True

        wait_until("Redis", answers)
        return f"redis://127.0.0.1:{port}/0"

    def gateway(self, name, config):
        """Starts a gateway with this config. `BACKEND` in it is the URL of the upstream."""
        ports = free_port(), free_port()
        listeners = f"server: {{ listen: '127.0.0.1:{ports[0]}' }}\nadmin: {{ listen: '127.0.0.1:{ports[1]}' }}\n"
        path = self.folder / f"{name}.yaml"
        backend = f"http://127.0.0.1:{self.backend.server_port}/v1"
        path.write_text(listeners + config.replace("BACKEND", backend))
        binary = os.environ.get("TOLLGATE_BIN", str(ROOT / "target/debug/tollgate"))
        self.start([binary, "serve", "--config", str(path)], name)
        gateway = Gateway(*ports)
        wait_until(name, lambda: request(f"{gateway.admin}/readyz")[0] == 200)
        return gateway

    def prometheus(self, gateways):
        """Starts a Prometheus that scrapes these gateways and evaluates the shipped rules twice a second."""
        for name in ["rules.yaml", "alerts.yaml"]:
            shutil.copy(PROMETHEUS / name, self.folder / name)
        targets = [gateway.admin.removeprefix("http://") for gateway in gateways]
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "scrape_configs": [{"job_name": "tollgate", "static_configs": [{"targets": targets}]}],
            "rule_files": ["rules.yaml", "alerts.yaml"],
        }
        # YAML contains JSON.
        (self.folder / "prometheus.yaml").write_text(json.dumps(config))
        port = free_port()
        command = ["prometheus", "--config.file=prometheus.yaml", f"--web.listen-address=127.0.0.1:{port}"]
        self.start([*command, "--storage.tsdb.path=tsdb", "--log.level=warn"], "prometheus")
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        wait_until("Prometheus", lambda: request(f"{prometheus.url}/-/ready")[0] == 200)
        return prometheus


class Gateway:
    def __init__(self, port, admin_port):
        self.url, self.admin = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"

    def chat(self, environment, text, key=None, **fields):
        body = {"model": "gpt-4o", "max_tokens": 20, "messages": [{"role": "user", "content": text}], **fields}
        return request(f"{self.url}/{environment}/v1/chat/completions", body, key=key)

    def metrics(self):
        return request(f"{self.admin}/metrics")[1]


class Prometheus:
    def __init__(self, url):
        self.url = url

    def get(self, path, **parameters):
        _, text = request(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(text)
        if answer["status"] != "success":
            raise AssertionError(f"{parameters}: {answer['error']}")
        return answer["data"]

    def query(self, expression):
        return self.get("query", query=expression)["result"]
