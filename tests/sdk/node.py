"""Runs the tests of `node/`: each file against a gateway and an upstream of its own."""

import json
import os
import pathlib
import subprocess
import sys

import house
import upstream

FOLDER = pathlib.Path(__file__).parent / "node"
failed = []
for file in sorted(FOLDER.glob("*.test.mjs")):
    print(f"\n{file.name}", flush=True)
    running = house.House("openai")
    try:
        told = {
            "gateway": running.address,
            "admin": running.admin,
            "upstream": running.upstream.address,
            "key": house.KEY,
            "parallel": house.PARALLEL,
            "room": house.ROOM,
            "period": house.PERIOD,
            "cost": house.COST,
            "text": upstream.TEXT,
            "calls": [{"name": name, "arguments": arguments} for name, arguments in upstream.CALLS],
        }
        command = ["node", "--test", "--test-reporter=spec", str(file)]
        failed += [file.name] * (subprocess.run(command, env=os.environ | {"HOUSE": json.dumps(told)}).returncode != 0)
    finally:
        running.close()
sys.exit(f"failed: {failed}" if failed else 0)
