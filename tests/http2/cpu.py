#!/usr/bin/env python3
"""Measures the CPU time of a small chat by protocol: the gateway ($TOLLGATE_BIN) beside nginx as a proxy, in one run.

It needs nginx, h2load (package nghttp2-client) and openssl. `cpu.py [REQUESTS [ROUNDS]]`: 20,000 requests and three rounds by
default. The proxies alternate. It prints the median and the minimum of the rounds, in microseconds of CPU time per request, and
the median of the ratios of each round.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

REQUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 3
ANSWER = '{"id":"c1","object":"chat.completion","model":"gpt-4o","choices":[{"index":0,"message":{"role":"assistant","content":"Hello there"},"finish_reason":"stop"}],"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10}}'
BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello, this is a small chat request. " * 4}]}
UPSTREAM, PLAIN, H2C, TLS = 7001, 7010, 7011, 7012
CLOCK_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


def nginx(folder, name, content):
    path = f"{folder}/{name}.conf"
    temporary = "".join(f"{kind}_temp_path {folder}/{name}-{kind};" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f"worker_processes 1; daemon off; pid {folder}/{name}.pid; error_log /dev/null; events {{ worker_connections 4096; }}"
            f" http {{ access_log off; keepalive_requests 100000000; {temporary} {content} }}"
        )
    return subprocess.Popen(["nginx", "-c", path], stderr=subprocess.DEVNULL)


def gateway(folder, tls):
    path = f"{folder}/tollgate-{tls}.yaml"
    pair = f", tls: {{ cert: '{folder}/cert.pem', key: '{folder}/key.pem' }}" if tls else ""
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f"server: {{ listen: '127.0.0.1:0'{pair} }}\nadmin: {{ listen: '127.0.0.1:0' }}\n"
            f"upstreams: {{ u: {{ base_url: 'http://127.0.0.1:{UPSTREAM}/v1' }} }}\n"
            "environments: { e: { upstream: u, quotas: { requests: { limit: 1G, per: minute }, total_tokens: { limit: 100G, per: minute } } } }\n"
            "default_environment: e\nstore: { memory: true }\n"
        )
    log = open(f"{path}.log", "w+", encoding="utf-8")
    process = subprocess.Popen([os.environ["TOLLGATE_BIN"], "serve", "--config", path], stderr=log)
    while True:
        with open(f"{path}.log", encoding="utf-8") as lines:
            serving = [line for line in lines if '"serving"' in line]
        if serving:
            return process, int(json.loads(serving[0])["address"].rsplit(":", 1)[1])
        time.sleep(0.05)


def cpu_us(pid):
    """CPU time of a process and its children."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    total = 0
    for process in [pid, *children]:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total * CLOCK_TICK_US


def measure(folder, pid, url, versions):
    before = cpu_us(pid)
    command = ["h2load", "-n", str(REQUESTS), "-c", "16", "-d", f"{folder}/body.json", "-H", "content-type: application/json"]
    output = subprocess.run([*command, *versions, url], capture_output=True, text=True, check=False).stdout
    answered = re.search(r"status codes: (\d+) 2xx", output)
    if not answered or int(answered.group(1)) != REQUESTS:
        sys.exit(f"{url}: {output}")
    return (cpu_us(pid) - before) / REQUESTS


def main(folder):
    certificate = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-subj", "/CN=localhost"]
    subprocess.run([*certificate, "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"], check=True, stderr=subprocess.DEVNULL)
    with open(f"{folder}/body.json", "w", encoding="utf-8") as file:
        json.dump(BODY, file)
    answer = f"location / {{ default_type application/json; return 200 '{ANSWER}'; }}"
    proxy = (
        f"upstream u {{ server 127.0.0.1:{UPSTREAM}; keepalive 128; keepalive_requests 100000000; }}"
        f" server {{ listen 127.0.0.1:{PLAIN}; listen 127.0.0.1:{H2C} http2; listen 127.0.0.1:{TLS} ssl http2;"
        f" ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;"
        " location / { proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection ''; } }"
    )
    upstream = nginx(folder, "upstream", f"server {{ listen 127.0.0.1:{UPSTREAM}; {answer} }}")
    other = nginx(folder, "proxy", proxy)
    (plain, plain_port), (tls, tls_port) = gateway(folder, False), gateway(folder, True)
    processes = [upstream, other, plain, tls]
    cases = {
        "HTTP/1.1": ("http", ["--h1"], PLAIN, plain, plain_port),
        "HTTP/2 without TLS": ("http", ["-m", "4"], H2C, plain, plain_port),
        "HTTP/1.1 over TLS": ("https", ["--h1"], TLS, tls, tls_port),
        "HTTP/2 over TLS": ("https", ["-m", "4"], TLS, tls, tls_port),
    }
    figures = {name: ([], []) for name in cases}
    try:
        time.sleep(1)
        for _ in range(ROUNDS):
            for name, (scheme, versions, other_port, process, port) in cases.items():
                for at, (target, pid) in enumerate([(other_port, other.pid), (port, process.pid)]):
                    url = f"{scheme}://127.0.0.1:{target}/v1/chat/completions"
                    figures[name][at].append(measure(folder, pid, url, versions))
        for name, figure in figures.items():
            nginx_us, gateway_us = (f"{statistics.median(rounds):6.1f} us (minimum {min(rounds):5.1f})" for rounds in figure)
            ratio = statistics.median(ours / theirs for theirs, ours in zip(*figure))
            print(f"{name:20} nginx {nginx_us}   tollgate {gateway_us}   ratio {ratio:.2f}")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


with tempfile.TemporaryDirectory() as temporary_folder:
    os.chmod(temporary_folder, 0o755)
    main(temporary_folder)
