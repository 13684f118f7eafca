"""The soak: see tests/soak/run. Usage: soak.py SECONDS GATEWAY."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

from port import free_port

SECONDS, GATEWAY = float(sys.argv[1]), sys.argv[2]
HERE = os.path.dirname(os.path.abspath(__file__))
CALLERS = 16
MAX_TOKENS = 40
PROMPT = 8
FOLDER = tempfile.mkdtemp(prefix="soak-")

LISTEN, ADMIN, UPSTREAM, REDIS = (free_port() for _ in range(4))
RECORD = os.path.join(FOLDER, "record")
HAS_REDIS = shutil.which("redis-server") is not None

CONFIG = f"""
server: {{ listen: '127.0.0.1:{LISTEN}', drain_timeout: 5s }}
admin: {{ listen: '127.0.0.1:{ADMIN}' }}
upstreams: {{ sim: {{ base_url: 'http://127.0.0.1:{UPSTREAM}/v1', timeouts: {{ first_byte: 10s, idle: 10s }} }} }}
environments:
  soak:
    upstream: sim
    reserve: {{ completion: max_tokens }}
    quotas: {{ total_tokens: {{ limit: 10G, per: day }}, requests: {{ limit: 1G, per: day }} }}
default_environment: soak
store:
  path: '{FOLDER}/soak.db'
"""
if HAS_REDIS:
    CONFIG += f"  redis: {{ url: 'redis://127.0.0.1:{REDIS}/0', on_failure: local }}\n"


class Child:
    """A process that is killed and started again."""

    def __init__(self, name, command):
        self.name, self.command, self.process, self.kills = name, command, None, 0

    def start(self):
        log = open(os.path.join(FOLDER, self.name + ".log"), "a")
        self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def kill(self, with_signal=signal.SIGKILL):
        self.kills += with_signal == signal.SIGKILL
        self.process.send_signal(with_signal)
        self.process.wait()


class Request:
    """What a caller knows of its request: when it began and ended, and whether its answer was complete."""

    def __init__(self):
        self.begun, self.ended, self.is_complete = time.monotonic(), None, False


requests = {}
gateway_kills = []
is_over = False


def admin(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}{path}", timeout=5) as answer:
        return answer.read()


def environment():
    return json.loads(admin("/api/environments"))["environments"][0]


async def until(what, condition, limit=40):
    deadline = time.monotonic() + limit
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            sys.exit(f"*** timed out waiting for {what}")
        await asyncio.sleep(0.1)


async def ask(number):
    """One request, which the caller breaks off in one of ten cases. Returns whether its answer was complete."""
    streams = random.random() < 0.6
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}], "max_tokens": MAX_TOKENS, "stream": streams}
    body = json.dumps(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", LISTEN)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\nx-number: {number}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        if random.random() < 0.1:
            await asyncio.wait_for(reader.read(random.randint(1, 3000)), 20)
            return False
        answer = await asyncio.wait_for(reader.read(), 30)
        is_whole = answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") if streams else answer.endswith(b"}}")
        return answer.startswith(b"HTTP/1.1 200") and is_whole
    finally:
        writer.close()


async def caller(first):
    number = first
    while not is_over:
        request = requests[number] = Request()
        try:
            request.is_complete = await ask(number)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.05)
        request.ended = time.monotonic()
        number += CALLERS


async def kills(gateway, upstream, redis, end):
    """Kills one of the processes every few seconds, and the gateway only in the first half."""
    half = time.monotonic() + (end - time.monotonic()) / 2
    pause = min(8.0, SECONDS / 12)
    while time.monotonic() < end - 2:
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        victims = [upstream] + ([redis] if redis else []) + ([gateway] if time.monotonic() < half else [])
        victim = random.choice(victims)
        print(f"{SECONDS - (end - time.monotonic()):6.0f} s: kills the {victim.name}", flush=True)
        if victim is gateway:
            gateway_kills.append(time.monotonic())
        victim.kill()
        await asyncio.sleep(random.random())
        victim.start()


def resources(process):
    status = dict(line.split(":\t", 1) for line in open(f"/proc/{process.pid}/status") if ":\t" in line)
    return int(status["VmRSS"].split()[0]) // 1024, len(os.listdir(f"/proc/{process.pid}/fd")), int(status["Threads"])


def bounds():
    """The least and the most that may be charged, in tokens, and the number of requests at the upstream."""
    begun = {}
    for line in open(RECORD):
        words = line.split()
        if words[0] == "begun":
            # After a kill of the upstream a request may be sent again. Only the last attempt is charged.
            begun[int(words[1])] = int(words[3])
    least, most = 0, 0
    for number, request in requests.items():
        ended = request.ended or time.monotonic()
        # A kill of the gateway charges the reservations in flight. Settlements of the last second may be lost.
        was_in_flight = any(request.begun <= kill <= ended for kill in gateway_kills)
        was_recent = any(kill - 1 <= ended <= kill for kill in gateway_kills)
        charge = PROMPT + begun.get(number, 0)
        most += PROMPT + MAX_TOKENS if was_in_flight else charge
        if request.is_complete and not was_in_flight and not was_recent:
            least += charge
    return least, most, len(begun)


async def main():
    global is_over
    config = os.path.join(FOLDER, "soak.yaml")
    open(config, "w").write(CONFIG)
    gateway = Child("gateway", [GATEWAY, "serve", "--config", config])
    upstream = Child("upstream", [sys.executable, os.path.join(HERE, "upstream.py"), str(UPSTREAM), RECORD])
    redis = None
    if HAS_REDIS:
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(REDIS), "--dir", FOLDER, "--appendonly", "yes", "--save", ""]
        redis = Child("redis", command)
    children = [child for child in (redis, upstream, gateway) if child]
    try:
        for child in children:
            child.start()
        await until("the gateway", lambda: admin("/readyz"))
        end = time.monotonic() + SECONDS
        callers = [asyncio.create_task(caller(first)) for first in range(CALLERS)]
        killer = asyncio.create_task(kills(gateway, upstream, redis, end))
        await asyncio.sleep(SECONDS * 0.6)
        base = resources(gateway.process)
        await killer
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        is_over = True
        await asyncio.gather(*callers)
        await until("the gateway to be ready", lambda: admin("/readyz"))
        # A killed gateway's session in Redis expires after 15 seconds.
        is_idle = lambda: environment()["in_flight"] == 0 and all(quota["held"] == 0 for quota in environment()["quotas"])
        await until("everything to settle", is_idle)
        await asyncio.sleep(2)
        memory, descriptors, threads = resources(gateway.process)
        now = environment()
        least, most, seen = bounds()
        used = next(q["used"] for q in now["quotas"] if q["kind"] == "total_tokens" and q["per"] == "day")
        total = now["totals"]["total_tokens"]
        complete = sum(request.is_complete for request in requests.values())
        print(f"{len(requests)} requests, {seen} begun at the upstream, {complete} complete at their callers")
        print("kills: " + ", ".join(f"{child.name} {child.kills}" for child in children))
        print(f"charged {used} by the quota and {total} by the history, between {least} and {most} by the record")
        print(f"memory {base[0]} -> {memory} MiB, descriptors {base[1]} -> {descriptors}, threads {base[2]} -> {threads}")
        faults = []
        if not least <= used <= most:
            faults.append("the quota's charge is outside of its bounds")
        if not least <= total <= most:
            faults.append("the history's charge is outside of its bounds")
        if memory > base[0] + 16 or descriptors > base[1] + 4 or threads > base[2] + 2:
            faults.append("memory, descriptors or threads are not back")
        if complete < len(requests) / 4:
            faults.append("too few requests were complete")
        for fault in faults:
            print(f"*** {fault}")
        return 1 if faults else 0
    finally:
        for child in children:
            if child.process:
                child.kill()
        if os.environ.get("SOAK_KEEP"):
            print(f"files: {FOLDER}")
        else:
            shutil.rmtree(FOLDER, ignore_errors=True)


sys.exit(asyncio.run(main()))
