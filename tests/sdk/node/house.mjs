// The gateway and the upstream that ../node.py has started, and what can be seen of both from outside.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

export const house = JSON.parse(process.env.HOUSE);

const get = async (url) => (await fetch(url)).json();

export const account = () => get(`${house.upstream}/account`);

export async function refill(environment) {
  assert.ok((await fetch(`${house.admin}/api/environments/${environment}/reset`, { method: "POST" })).ok);
}

// What was charged, once nothing is under way.
async function totals(environment) {
  const deadline = Date.now() + 10_000;
  while (Date.now() < deadline) {
    const state = await get(`${house.admin}/api/environments/${environment}`);
    if (state.in_flight === 0) {
      assert.ok(state.quotas.every((quota) => quota.held === 0));
      return state.totals;
    }
    await sleep(10);
  }
  assert.fail("never settled");
}

// What happens from here on: `charged` by the gateway, `seen` by the upstream.
export async function watch(environment) {
  const look = async () => [await totals(environment), await account()];
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
