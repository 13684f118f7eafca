// The gateway and the upstream that ../node.py has started, and access to the counters of both.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

export const testbed = JSON.parse(process.env.TESTBED);

const get = async (url) => (await fetch(url)).json();

export const stats = () => get(`${testbed.upstream}/stats`);

export async function refill(environment) {
  assert.ok((await fetch(`${testbed.admin}/api/environments/${environment}/reset`, { method: "POST" })).ok);
}

// Waits until no request is in flight, and returns the charged totals.
async function totals(environment) {
  const deadline = Date.now() + 10_000;
  while (Date.now() < deadline) {
    const state = await get(`${testbed.admin}/api/environments/${environment}`);
    if (state.in_flight === 0) {
      assert.ok(state.quotas.every((quota) => quota.held === 0));
      return state.totals;
    }
    await sleep(10);
  }
  assert.fail("requests are still in flight");
}

// Returns a function that returns the charges of the gateway and the counters of the upstream since this call.
export async function startMeasurement(environment) {
  const read = async () => [await totals(environment), await stats()];
  const before = await read();
  return async () => {
    const after = await read();
    const [charged, seen] = after.map((state, i) =>
      Object.fromEntries(Object.entries(state).map(([name, value]) => [name, value - before[i][name]])),
    );
    assert.deepEqual(after[1].faults, []);
    return { charged, seen };
  };
}
