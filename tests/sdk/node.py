"""Runs the tests in `node/`, each file with its own gateway and upstream."""

import json
import os
import pathlib
import subprocess
import sys

import testbed
import upstream

FOLDER = pathlib.Path(__file__).parent / "node"
failed = []
for file in sorted(FOLDER.glob("*.test.mjs")):
    print(f"\n{file.name}", flush=True)
    running = testbed.Testbed("openai")
    try:
        settings = {
            "gateway": running.address,
            "admin": running.admin,
            "upstream": running.upstream.address,
            "key": testbed.KEY,
            "parallel": testbed.PARALLEL,
            "room": testbed.ROOM,
            "period": testbed.PERIOD,
            "cost": testbed.COST,
            "text": upstream.TEXT,
            "calls": [{"name": name, "arguments": arguments} for name, arguments in upstream.CALLS],
        }
        command = ["node", "--test", "--test-reporter=spec", str(file)]
        failed += [file.name] * (subprocess.run(command, env=os.environ | {"TESTBED": json.dumps(settings)}).returncode != 0)
    finally:
        running.close()
sys.exit(f"failed: {failed}" if failed else 0)
