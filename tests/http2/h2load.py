#!/usr/bin/env python3
"""Sends requests to the gateway with h2load (package nghttp2-client): over HTTP/2 and HTTP/1.1, with and without TLS.

Every request must be answered with 200 and charged once. The program is $TOLLGATE_BIN.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request

REQUESTS = 2000
ANSWER = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
BODY = '{"model":"gpt-4o","messages":[{"role":"user","content":"hello"}]}'


async def upstream(reader, writer):
    """Answers every request of a connection."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head, re.I).group(1))
            await reader.readexactly(length)
            writer.write(HEAD + ANSWER)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def run(*command):
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return output.decode()


def config(folder, port, tls):
    pair = f", tls: {{ cert: '{folder}/cert.pem', key: '{folder}/key.pem' }}" if tls else ""
    return f"""
server: {{ listen: '127.0.0.1:0'{pair} }}
admin: {{ listen: '127.0.0.1:0' }}
upstreams: {{ u: {{ base_url: 'http://127.0.0.1:{port}/v1' }} }}
environments: {{ e: {{ upstream: u, quotas: {{ requests: {{ limit: 1M, per: minute }} }} }} }}
default_environment: e
store: {{ memory: true }}
"""


async def check(folder, port, tls):
    """Runs one gateway, and h2load against it. Returns the number of faults."""
    path = f"{folder}/t.yaml"
    with open(path, "w", encoding="utf-8") as file:
        file.write(config(folder, port, tls))
    gateway = await asyncio.create_subprocess_exec(
        os.environ["TOLLGATE_BIN"], "serve", "--config", path, stderr=subprocess.PIPE, env={**os.environ, "RUST_LOG": "warn,tollgate::cli=info"}
    )
    try:
        serving = {}
        while "admin" not in serving:
            line = await asyncio.wait_for(gateway.stderr.readline(), 20)
            serving = json.loads(line) if b'"serving"' in line else {}
        draining = asyncio.create_task(gateway.stderr.read())
        faults, scheme = 0, "https" if tls else "http"
        for version in (["-m", "20"], ["--h1"]):
            output = await run(
                "h2load", "-n", str(REQUESTS), "-c", "10", *version, "-d", f"{folder}/body.json",
                "-H", "content-type: application/json", f"{scheme}://{serving['address']}/v1/chat/completions",
            )  # fmt: skip
            answered = re.search(r"status codes: (\d+) 2xx", output)
            print(f"{scheme} {' '.join(version)}: {output.split('finished in ')[-1].splitlines()[0]}")
            if not answered or int(answered.group(1)) != REQUESTS:
                print(output)
                faults += 1
        with urllib.request.urlopen(f"http://{serving['admin']}/api/environments") as answer:
            environment = json.load(answer)["environments"][0]
        charged = environment["totals"]["requests"], environment["in_flight"]
        if charged != (2 * REQUESTS, 0):
            print(f"charged and in flight: {charged}")
            faults += 1
        draining.cancel()
        return faults
    finally:
        gateway.terminate()
        await gateway.wait()


async def main():
    with tempfile.TemporaryDirectory() as folder:
        await run(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem", "-days", "30", "-subj", "/CN=localhost",
        )  # fmt: skip
        with open(f"{folder}/body.json", "w", encoding="utf-8") as file:
            file.write(BODY)
        server = await asyncio.start_server(upstream, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        return sum([await check(folder, port, tls) for tls in (False, True)])


sys.exit(1 if asyncio.run(main()) else 0)
