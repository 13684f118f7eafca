"""The official `openai` package against a running gateway, with a mock upstream behind it.

Needs $TOLLGATE_BIN (the gateway's binary) and the packages of requirements.txt.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

KEY = "key-of-the-sdk-tests-1"
UPSTREAM_KEY = "sk-of-the-upstream"
MESSAGES = [{"role": "user", "content": "Say hello"}]


class Mock(BaseHTTPRequestHandler):
    """An upstream: answers like OpenAI, and reports 20 prompt and 5 completion tokens each time."""

    protocol_version = "HTTP/1.1"
    requests = 0
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}

    def log_message(self, *_):
        pass

    def send(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        model = {"id": "gpt-4o", "object": "model", "created": 1, "owned_by": "mock"}
        self.send(json.dumps({"object": "list", "data": [model]}).encode())

    def do_POST(self):
        Mock.requests += 1
        assert self.headers["authorization"] == f"Bearer {UPSTREAM_KEY}", self.headers
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
            usage = {"prompt_tokens": 20, "total_tokens": 20}
            self.send(json.dumps({"object": "list", "data": data, "model": body["model"], "usage": usage}).encode())
        elif body.get("stream"):
            self.stream(body)
        else:
            message = {"role": "assistant", "content": "Hello there"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": self.usage}
            self.send(json.dumps(answer).encode())

    def stream(self, body):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        cut = body.get("user") == "cut"
        for word in ["Hello", " there"]:
            self.event(body, [{"index": 0, "delta": {"content": word}, "finish_reason": None}])
            if cut:
                self.close_connection = True
                return
        self.event(body, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
        if body.get("stream_options", {}).get("include_usage"):
            self.event(body, [], self.usage)
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, body, choices, usage=None):
        event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": body["model"], "choices": choices, "usage": usage}
        self.chunk(f"data: {json.dumps(event)}\n\n".encode())

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


CONFIG = """
server: {{ listen: "127.0.0.1:0" }}
admin: {{ listen: "127.0.0.1:0" }}
upstreams: {{ mock: {{ base_url: "http://127.0.0.1:{port}/v1", api_key: {upstream_key} }} }}
environments:
  roomy:
    upstream: mock
    keys: [{{ name: sdk, secret: {key} }}]
    quotas: {{ total_tokens: {{ limit: 1M, per: day }} }}
  tight:
    upstream: mock
    reserve: {{ completion: 5 }}
    quotas: {{ requests: {{ limit: 1, per: hour }} }}
store: {{ memory: true }}
"""


class OpenAiPackage(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.mock = ThreadingHTTPServer(("127.0.0.1", 0), Mock)
        cls.mock.daemon_threads = True
        threading.Thread(target=cls.mock.serve_forever, daemon=True).start()
        cls.folder = tempfile.TemporaryDirectory()
        config = pathlib.Path(cls.folder.name) / "sdk.yaml"
        config.write_text(CONFIG.format(port=cls.mock.server_port, key=KEY, upstream_key=UPSTREAM_KEY))
        cls.gateway = subprocess.Popen(
            [os.environ["TOLLGATE_BIN"], "serve", "--config", str(config)], stderr=subprocess.PIPE, text=True
        )
        for line in cls.gateway.stderr:
            if '"serving"' in line:
                started = json.loads(line)
                cls.base, cls.admin = f"http://{started['address']}", f"http://{started['admin']}"
                break
        else:
            raise RuntimeError("the gateway did not start")
        # Its log has to be read on, or it would be in its own way.
        threading.Thread(target=cls.gateway.stderr.read, daemon=True).start()

    @classmethod
    def tearDownClass(cls):
        cls.gateway.terminate()
        assert cls.gateway.wait(20) == 0
        cls.mock.shutdown()
        cls.folder.cleanup()

    def client(self, environment="roomy", key=KEY, **options):
        return openai.OpenAI(base_url=f"{self.base}/{environment}/v1", api_key=key, max_retries=0, **options)

    def totals(self, environment="roomy"):
        """What was charged, once nothing is under way."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"{self.admin}/api/environments/{environment}") as answer:
                state = json.load(answer)
            if state["in_flight"] == 0:
                assert all(quota["held"] == 0 for quota in state["quotas"]), state
                return state["totals"]
        raise AssertionError("never settled")

    def charged(self, call, environment="roomy"):
        before = self.totals(environment)
        result = call()
        after = self.totals(environment)
        return result, {kind: after[kind] - before[kind] for kind in after}

    def test_chat(self):
        answer, charged = self.charged(lambda: self.client().chat.completions.create(model="gpt-4o", messages=MESSAGES))
        self.assertEqual(answer.choices[0].message.content, "Hello there")
        self.assertEqual(answer.usage.total_tokens, 25)
        self.assertEqual((charged["requests"], charged["total_tokens"]), (1, 25))

    def test_streaming_chat_sees_no_chunk_it_did_not_ask_for_and_is_charged_what_was_reported(self):
        def call():
            return list(self.client().chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True))

        chunks, charged = self.charged(call)
        self.assertTrue(all(chunk.choices for chunk in chunks))
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks), "Hello there")
        self.assertEqual((charged["prompt_tokens"], charged["completion_tokens"]), (20, 5))

    def test_streaming_chat_gets_the_usage_it_asked_for(self):
        options = {"include_usage": True}
        stream = self.client().chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True, stream_options=options)
        chunks = list(stream)
        self.assertEqual((chunks[-1].choices, chunks[-1].usage.total_tokens), ([], 25))

    def test_embeddings(self):
        def call():
            return self.client().embeddings.create(model="text-embedding-3-small", input=["a", "b"], encoding_format="float")

        answer, charged = self.charged(call)
        self.assertEqual(answer.data[0].embedding, [0.5, -0.25])
        self.assertEqual((charged["prompt_tokens"], charged["completion_tokens"]), (20, 0))

    def test_models(self):
        models, charged = self.charged(lambda: self.client().models.list())
        self.assertEqual([model.id for model in models], ["gpt-4o"])
        self.assertEqual(charged["requests"], 0)

    def test_a_429_is_a_rate_limit_error_and_is_not_retried_when_that_would_be_in_vain(self):
        client = self.client("tight", "any")
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        seen = Mock.requests
        started = time.monotonic()
        with self.assertRaises(openai.RateLimitError) as raised:
            client.with_options(max_retries=5).chat.completions.create(model="gpt-4o", messages=MESSAGES)
        self.assertLess(time.monotonic() - started, 3, "the package retried")
        self.assertEqual(Mock.requests, seen)
        error = raised.exception
        self.assertEqual((error.code, error.type), ("rate_limit_exceeded", "requests"))
        self.assertGreaterEqual(int(error.response.headers["retry-after"]), 1)
        self.assertEqual(error.response.headers["x-should-retry"], "false")
        self.assertEqual(self.totals("tight")["rejected"], 1)

    def test_a_bad_key_is_an_authentication_error(self):
        with self.assertRaises(openai.AuthenticationError) as raised:
            self.client(key="wrong").chat.completions.create(model="gpt-4o", messages=MESSAGES)
        self.assertEqual(raised.exception.code, "invalid_api_key")

    def test_a_cut_stream_raises(self):
        stream = self.client().chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True, user="cut")
        received = []
        with self.assertRaises(openai.APIError) as raised:
            for chunk in stream:
                received.append(chunk.choices[0].delta.content)
        self.assertEqual(received, ["Hello"])
        self.assertRegex(str(raised.exception), "broke off")

    def test_a_bad_request_names_its_parameter(self):
        with self.assertRaises(openai.BadRequestError) as raised:
            self.client().chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=-1)
        self.assertEqual((raised.exception.code, raised.exception.param), ("invalid_value", "max_tokens"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
