"""Starts `tollgate demo` and runs the commands that it prints. Needs $TOLLGATE_BIN, the gateway's binary."""

import os
import re
import subprocess
import sys

demo = subprocess.Popen([os.environ["TOLLGATE_BIN"], "demo"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
try:
    lines = []
    for line in demo.stdout:
        lines.append(line.strip())
        if line.startswith("Dashboard"):
            break
    commands = [line for line in lines if line.startswith(("curl ", "for i "))]
    assert len(commands) == 4, lines
    run = lambda command: subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    chat, stream, refused, quotas = map(run, commands)
    assert " 200 " in chat and "x-ratelimit-remaining-tokens" in chat and '"usage"' in chat, chat
    assert stream.rstrip().endswith("data: [DONE]") and '"choices":[]' not in stream, stream
    assert refused.split()[0] == "200" and refused.split()[-1] == "429", refused
    assert '"held":0' in quotas.replace(" ", "") and '"name":"sandbox"' in quotas.replace(" ", ""), quotas
    page = re.search(r"Dashboard: (\S+)", lines[-1]).group(1)
    assert "<title>Tollgate</title>" in run(f"curl -s {page}")
    print("all commands of the demo work; status codes of the sandbox:", " ".join(refused.split()))
finally:
    demo.terminate()
    sys.exit(demo.wait(20) if sys.exc_info()[0] is None else 1)
