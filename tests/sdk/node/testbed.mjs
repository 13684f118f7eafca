// The gateway and the upstream that ../node.py has started, and access to the counters of both.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

export const testbed = JSON.parse(process.env.TESTBED);

const get = async (url) => (await fetch(url)).json();

export const stats = () => get(`${testbed.upstream}/stats`);

export async function refill(environment) {
  assert.ok((await fetch(`${testbed.admin}/api/environments/${environment}/reset`, { method: "POST" })).ok);
}

// The charged totals, once no request is in flight.
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

// Measures from here on what the gateway has charged and what the upstream has seen.
export async function watch(environment) {
  const look = async () => [await totals(environment), await stats()];
  const before = await look();
  return async () => {
    const after = await look();
    const [charged, seen] = after.map((state, i) =>
      Object.fromEntries(Object.entries(state).map(([name, value]) => [name, value - before[i][name]])),
    );
    assert.deepEqual(after[1].faults, []);
    return { charged, seen };
  };
}
