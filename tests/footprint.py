"""Checks the size of the gateway's binary, its memory when idle, and how soon it is ready.

    python3 tests/footprint.py BINARY [--max-size MB] [--max-memory MB] [--max-ready MS]

Without options the bounds are those of a release build on a machine without other work. The config names models of both
vocabularies, so that none of them is missing from the figures.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

CONFIG = """
server: { listen: 127.0.0.1:0 }
admin: { listen: 127.0.0.1:0 }
upstreams:
  openai: { base_url: http://127.0.0.1:9, api_key: unused }
environments:
  production:
    upstream: openai
    quotas: { total_tokens: { limit: 200k, per: minute } }
models:
  - { match: "new-*", encoding: o200k_base }
  - { match: "old-*", encoding: cl100k_base }
default_environment: production
store: { path: usage.db }
"""
ROUNDS = 5


def memory(pid):
    """Resident memory in MB: all of it, and the part that is not a page of a file."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return [int(fields[name].split()[0]) / 1000 for name in ("VmRSS", "RssAnon")]


def start(binary, folder):
    """Milliseconds until /readyz answers 200, and the memory a second later."""
    started = time.monotonic()
    gateway = subprocess.Popen([binary, "serve", "--config", folder / "config.yaml"], cwd=folder, text=True,
                               stderr=subprocess.PIPE)
    try:
        admin = next(json.loads(line)["admin"] for line in gateway.stderr if '"serving"' in line)
        urllib.request.urlopen(f"http://{admin}/readyz").close()
        ready = (time.monotonic() - started) * 1000
        time.sleep(1)
        return ready, *memory(gateway.pid)
    finally:
        gateway.terminate()
        gateway.communicate(timeout=20)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("binary", type=pathlib.Path)
    arguments.add_argument("--max-size", type=float, default=30)
    arguments.add_argument("--max-memory", type=float, default=60)
    arguments.add_argument("--max-ready", type=float, default=100)
    options = arguments.parse_args()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.yaml").write_text(CONFIG)
        rounds = [start(options.binary.resolve(), pathlib.Path(folder)) for _ in range(ROUNDS)]
    size = options.binary.stat().st_size / 1e6
    ready = min(ready for ready, _, _ in rounds)
    resident = max(resident for _, resident, _ in rounds)
    anonymous = max(anonymous for _, _, anonymous in rounds)
    print(f"binary: {size:.1f} MB (at most {options.max_size:g})")
    print(f"memory when idle: {resident:.1f} MB, of which {anonymous:.1f} not from files (at most {options.max_memory:g})")
    print(f"ready after {ready:.0f} ms, the best of {ROUNDS} (at most {options.max_ready:g})")
    if size > options.max_size or resident > options.max_memory or ready > options.max_ready:
        sys.exit("a bound is exceeded")


main()
