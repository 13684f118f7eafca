"""Runs the examples of docs/sdks.md with the real SDKs, against a gateway with the config of that page.

An example is a code block below a comment such as

    <!-- run: production, spent, OPENAI_BASE_URL=http://127.0.0.1:8080/v1, prints 429 rate_limit_exceeded -->

It names the environment whose key the example gets in $TOLLGATE_KEY. `spent`: the environment has no request left.
`prints`: words that the output contains in this order.

Needs $TOLLGATE_BIN, the gateway's binary.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import upstream

ROOT = pathlib.Path(__file__).parents[2]
NODE = pathlib.Path(__file__).parent / "node"
ADDRESS = "http://127.0.0.1:8080"
UPSTREAMS = {
    "https://api.openai.com": "",
    "https://api.anthropic.com": "",
    "https://generativelanguage.googleapis.com": "",
    "https://RESOURCE.openai.azure.com": "",
}
EXAMPLE = re.compile(r"<!-- run: ([^>]*?), prints (.*?) -->\n```(\w+)\n(.*?)\n```", re.DOTALL)
MIN_EXAMPLES = 20
TIMEOUT_SECONDS = 60
COMMANDS = {
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
    "bash": ["bash", "-c"],
}


def key_of(environment):
    return f"key-of-the-environment-{environment}"


class Gateway:
    """A gateway with the config of the page. All its upstreams are the scriptable one."""

    def __init__(self, config):
        self.upstream = upstream.Upstream()
        for url in UPSTREAMS:
            assert url in config, f"the config of the page has no {url}"
            config = config.replace(url, self.upstream.address)
        config += 'server: { listen: "127.0.0.1:0" }\nadmin: { listen: "127.0.0.1:0" }\nstore: { memory: true }\n'
        names = re.findall(r"\$\{(\w+)\}", config)
        variables = {name: upstream.KEY for name in names}
        variables |= {name: key_of(name[7:].lower()) for name in names if name.startswith("KEY_OF_")}
        self.folder = tempfile.TemporaryDirectory()
        file = pathlib.Path(self.folder.name) / "page.yaml"
        file.write_text(config)
        command = [os.environ["TOLLGATE_BIN"], "serve", "--config", str(file)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | variables)
        for line in self.process.stderr:
            if '"serving"' in line:
                started = json.loads(line)
                self.address, self.admin = f"http://{started['address']}", f"http://{started['admin']}"
                break
        else:
            raise RuntimeError("the gateway did not start")
        self.log = threading.Thread(target=self.process.stderr.read, daemon=True)
        self.log.start()

    def spend(self, environment):
        """Leaves no request in the environment."""
        body = json.dumps({"limit": 1}).encode()
        url = f"{self.admin}/api/environments/{environment}/quotas/requests/hour"
        urllib.request.urlopen(urllib.request.Request(url, body, method="PUT")).close()

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self.log.join(5)
        self.process.stderr.close()
        self.upstream.close()
        self.folder.cleanup()


def run(gateway, options, expected, language, code):
    """Runs an example. Returns what is wrong with its output, or None."""
    environment, *options = [option.strip() for option in options.split(",")]
    key = key_of(environment)
    variables = {"TOLLGATE_KEY": key, "NO_PROXY": "127.0.0.1"}
    for assignment in shlex.split(" ".join(option for option in options if option != "spent")):
        name, _, value = assignment.partition("=")
        variables[name] = value.replace(ADDRESS, gateway.address).replace("$TOLLGATE_KEY", key)
    command = [*COMMANDS[language], code.replace(ADDRESS, gateway.address)]
    started = time.monotonic()
    finished = subprocess.run(
        command, cwd=NODE, env=os.environ | variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    output, place = finished.stdout, 0
    seconds = time.monotonic() - started
    print(f"{seconds:5.1f} s  {environment}, {language}: {' '.join(output.split())[:100]}", flush=True)
    for word in expected.split():
        place = output.find(word, place)
        if place < 0 or finished.returncode != 0:
            return f"{code}\n--- exit code {finished.returncode}, expected {expected!r}\n{output}\n{finished.stderr}"
        place += len(word)
    return None


def main():
    page = (ROOT / "docs/sdks.md").read_text()
    config = re.search(r"```yaml\n(upstreams:.*?)```", page, re.DOTALL).group(1)
    examples = EXAMPLE.findall(page)
    markers = page.count("<!-- run:")
    assert len(examples) == markers >= MIN_EXAMPLES, f"{len(examples)} examples, {markers} comments"
    gateway = Gateway(config)
    try:
        is_spent = lambda options: "spent" in options.split(", ")
        faults = []
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for spent in [False, True]:
                chosen = [example for example in examples if is_spent(example[0]) == spent]
                if spent:
                    for environment in {example[0].split(",")[0] for example in chosen}:
                        gateway.spend(environment)
                faults += filter(None, pool.map(lambda example: run(gateway, *example), chosen))
        faults += gateway.upstream.stats.snapshot()["faults"]
    finally:
        gateway.close()
    print("\n".join(faults))
    print(f"{len(examples) - len(faults)} passed, {len(faults)} failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
