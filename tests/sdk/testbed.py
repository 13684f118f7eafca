"""A gateway with the scriptable upstream behind it, and access to the counters of both.

Needs $TOLLGATE_BIN, the gateway's binary.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import threading
import time
import urllib.request

import upstream

KEY = "key-of-the-sdk-tests-1"
# Tokens that the environments `burst` and `patient` reserve for an answer, which is also its usage. `burst` has room for
# ROOM answers, and `patient` for one answer per PERIOD (in seconds).
COST = sum(upstream.USAGE)
PARALLEL, ROOM = 10, 4
PERIOD = 2
CONFIG = """
server: {{ listen: "127.0.0.1:0" }}
admin: {{ listen: "127.0.0.1:0" }}
upstreams: {{ mock: {{ base_url: "{address}{base_path}", api: {api}, api_key: {upstream_key} }} }}
environments:
  roomy:
    upstream: mock
    keys: [{{ name: sdk, secret: {key} }}]
    quotas: {{ total_tokens: {{ limit: 1M, per: day }} }}
  burst:
    upstream: mock
    reserve: {{ prompt: none, completion: {cost} }}
    quotas: {{ total_tokens: {{ limit: {burst}, per: hour }} }}
  patient:
    upstream: mock
    reserve: {{ prompt: none, completion: {cost} }}
    quotas: {{ total_tokens: {{ limit: {cost}, per: {period}s }} }}
store: {{ memory: true }}
"""


class Testbed:
    """`api` is the setting of the upstream with this name."""

    def __init__(self, api):
        # Requests to this machine must not use a proxy.
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
        self.upstream = upstream.Upstream()
        self.folder = tempfile.TemporaryDirectory()
        config = pathlib.Path(self.folder.name) / "sdk.yaml"
        values = {"key": KEY, "upstream_key": upstream.KEY, "cost": COST, "burst": ROOM * COST, "period": PERIOD}
        base_path = "/v1" if api == "openai" else ""
        config.write_text(CONFIG.format(api=api, address=self.upstream.address, base_path=base_path, **values))
        command = [os.environ["TOLLGATE_BIN"], "serve", "--config", str(config)]
        self.gateway = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.gateway.stderr:
            if '"serving"' in line:
                started = json.loads(line)
                self.address, self.admin = f"http://{started['address']}", f"http://{started['admin']}"
                break
        else:
            raise RuntimeError("the gateway did not start")
        # This thread reads the rest of the log, so that the pipe does not fill up.
        self.log = threading.Thread(target=self.gateway.stderr.read, daemon=True)
        self.log.start()

    def close(self):
        self.gateway.terminate()
        try:
            code = self.gateway.wait(20)
        finally:
            self.gateway.kill()
            self.log.join(5)
            self.gateway.stderr.close()
            self.upstream.close()
            self.folder.cleanup()
        assert code == 0, f"the gateway ended with {code}"

    def stats(self):
        return self.upstream.stats.snapshot()

    def refill(self, environment):
        request = urllib.request.Request(f"{self.admin}/api/environments/{environment}/reset", method="POST")
        urllib.request.urlopen(request).close()

    def totals(self, environment):
        """Waits until no request is in flight, and returns the charged totals."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"{self.admin}/api/environments/{environment}") as answer:
                state = json.load(answer)
            if state["in_flight"] == 0:
                assert all(quota["held"] == 0 for quota in state["quotas"]), state
                return state["totals"]
            time.sleep(0.01)
        raise AssertionError(f"requests are still in flight: {state}")

    def measure(self, environment):
        return Measurement(self, environment)


class Measurement:
    """The charges of the gateway and the counters of the upstream since the measurement was created."""

    def __init__(self, testbed, environment):
        self.testbed, self.environment = testbed, environment
        self.before = testbed.totals(environment), testbed.stats()

    def result(self):
        """Waits until no request is in flight, and returns both."""
        after = self.testbed.totals(self.environment), self.testbed.stats()
        charged, seen = ({k: v - b[k] for k, v in a.items() if k != "faults"} for a, b in zip(after, self.before))
        return charged, seen
