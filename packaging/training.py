#!/usr/bin/env python3
"""Starts a program of the gateway, and sends it the requests for which `packaging/release` optimises it.

    training.py PROGRAM [REQUESTS [--no-metrics]]

REQUESTS are those of a usual case over HTTP/1.1 (default 10,000); others have a multiple or a part of it. --no-metrics does not
read the metrics, which fails under valgrind.

The requests are of the APIs for text, as JSON and as streams, over HTTP/1.1 and HTTP/2, with and without TLS, with counters in a
file, and some are refused. The answers are those of fixtures/. It needs h2load (package nghttp2-client) and openssl. It
fails if an answer has another status than expected.
"""

import asyncio
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.request

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
KEY = "training-key"
USUAL = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
VERSIONS = [("--h1",), ("-m", "4")]
# The requests over HTTP/1.1 are divided by these numbers.
SHARES = {("http", "--h1"): 1, ("http", "-m"): 3, ("https", "--h1"): 3, ("https", "-m"): 3}


def chat(*texts, **fields):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "gpt-4o", "messages": messages, **fields}


QUESTION = "Why is the sky blue? Answer in a few words, please. "
CONTENTS = {"contents": [{"role": "user", "parts": [{"text": QUESTION}]}]}
CLAUDE = chat(QUESTION, model="claude-sonnet-4", max_tokens=100)
GEMINI = "/v1beta/models/gemini-2.5-flash"
# Path, body, answer, requests, status.
CASES = [
    ("/v1/chat/completions", chat(QUESTION), "chat.json", 4 * USUAL, 200),
    ("/v1/chat/completions", chat(QUESTION, stream=True), "chat_asked.sse", USUAL, 200),
    ("/v1/chat/completions", chat(*[f"{i} {QUESTION}" * 20 for i in range(31)]), "chat.json", USUAL // 4, 200),
    ("/v1/responses", {"model": "gpt-4o", "input": QUESTION}, "responses.json", USUAL // 2, 200),
    ("/v1/responses", {"model": "gpt-4o", "input": QUESTION, "stream": True}, "responses_stream.sse", USUAL // 2, 200),
    ("/v1/messages", CLAUDE, "anthropic.json", USUAL // 2, 200),
    ("/v1/messages", {**CLAUDE, "stream": True}, "anthropic_stream.sse", USUAL // 2, 200),
    (f"{GEMINI}:generateContent", CONTENTS, "gemini.json", USUAL // 2, 200),
    (f"{GEMINI}:streamGenerateContent?alt=sse", CONTENTS, "gemini_stream.sse", USUAL // 2, 200),
    ("/v1/embeddings", {"model": "text-embedding-3-small", "input": QUESTION}, "embeddings.json", USUAL // 2, 200),
    ("/spent/v1/chat/completions", chat(QUESTION), "chat.json", USUAL // 4, 429),
]  # fmt: skip


def answer_of(path, streams):
    """The answer of the simulated upstream as pieces, as it would write them."""
    for case_path, body, name, _, _ in CASES:
        tail = case_path.rsplit("/", 1)[1].split("?")[0]
        if tail in path and name.endswith(".sse") == (streams or "stream" in path):
            break
    content = (FIXTURES / name).read_bytes()
    if name.endswith(".json"):
        return [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content]
    events = [event + b"\n\n" for event in content.split(b"\n\n") if event.strip()]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%b\r\n" % (len(event), event) for event in events), b"0\r\n\r\n"]


async def upstream(reader, writer):
    """Answers every request of a connection."""
    answers = {}
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = await reader.readexactly(int(re.search(r"content-length: (\d+)", head).group(1)))
            request = head.split()[1], b'"stream":true' in body or b'"stream": true' in body
            for piece in answers.setdefault(request, answer_of(*request)):
                writer.write(piece)
                await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def config(folder, port, tls):
    pair = f", tls: {{ cert: '{folder}/cert.pem', key: '{folder}/key.pem' }}" if tls else ""
    quotas = ", ".join(
        f"{kind}: [{{ limit: 100G, per: minute }}, {{ limit: 1000G, per: day }}]"
        for kind in ["requests", "total_tokens", "prompt_tokens", "completion_tokens"]
    )
    return f"""
server: {{ listen: '127.0.0.1:0'{pair} }}
admin: {{ listen: '127.0.0.1:0' }}
upstreams: {{ u: {{ base_url: 'http://127.0.0.1:{port}/v1', api_key: k }} }}
environments:
  production: {{ upstream: u, keys: [{{ name: app, secret: {KEY}, quotas: {{ requests: {{ limit: 100G, per: minute }} }} }}], quotas: {{ {quotas} }} }}
  spent: {{ upstream: u, quotas: {{ requests: {{ limit: 1, per: day }} }} }}
default_environment: production
store: {{ path: '{folder}/{"tls" if tls else "plain"}.db' }}
"""


def case(folder, scheme, address, versions, path, body, requests, status):
    """Sends the requests of one case. Returns whether the answers were as expected."""
    requests //= SHARES[scheme, versions[0]]
    body_file = pathlib.Path(folder, "body.json")
    body_file.write_text(json.dumps(body), encoding="utf-8")
    headers = ["content-type: application/json"] + [f"authorization: Bearer {KEY}"] * (status == 200)
    command = ["h2load", "-n", str(requests), "-c", "8", *versions, "-d", str(body_file)]
    command += [argument for header in headers for argument in ("-H", header)] + [f"{scheme}://{address}{path}"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    counts = re.search(r"status codes: (\d+) 2xx, \d+ 3xx, (\d+) 4xx", output)
    expected = counts and int(counts.group(1 if status == 200 else 2))
    # The first request of the environment whose quota is one request is answered.
    is_expected = expected is not None and expected >= requests - (status != 200)
    print(f"{scheme} {' '.join(versions):6} {path}: {requests} requests" + ("" if is_expected else f"\n{output}"), flush=True)
    return is_expected


async def train(program, folder, port, tls):
    """Starts a gateway and sends it the requests of all cases. Returns whether all answers were as expected."""
    path = f"{folder}/{tls}.yaml"
    pathlib.Path(path).write_text(config(folder, port, tls), encoding="utf-8")
    with open(f"{folder}/{tls}.log", "w+", encoding="utf-8") as log:
        gateway = await asyncio.create_subprocess_exec(program, "serve", "--config", path, stderr=log)
        try:
            lines = []
            while not lines:
                await asyncio.sleep(0.1)
                if gateway.returncode is not None:
                    raise RuntimeError(pathlib.Path(log.name).read_text(encoding="utf-8"))
                with open(log.name, encoding="utf-8") as written:
                    lines = [json.loads(line) for line in written if '"serving"' in line]
            scheme = "https" if tls else "http"
            good = True
            for versions in VERSIONS:
                for target, body, _, requests, status in CASES:
                    good &= await asyncio.to_thread(case, folder, scheme, lines[0]["address"], versions, target, body, requests, status)
                if "--no-metrics" not in sys.argv:
                    with urllib.request.urlopen(f"http://{lines[0]['admin']}/metrics") as metrics:
                        metrics.read()
            return good
        finally:
            # The program writes its profile when it ends.
            if gateway.returncode is None:
                gateway.terminate()
            await gateway.wait()


async def main(program):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30",
             "-subj", "/CN=localhost", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        server = await asyncio.start_server(upstream, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        return all([await train(program, folder, port, tls) for tls in (False, True)])


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main(sys.argv[1])) else 1)
