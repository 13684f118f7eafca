// The tests that every SDK must pass, for Node. They equal those of ../contract.py.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { stats, testbed, refill, startMeasurement } from "./testbed.mjs";

const HELLO = "Say hello";
const CUT = `[cut] ${HELLO}`;
const SLOW = `[slow] ${HELLO}`;
export const QUESTION = "How is the weather in Zürich and in São Paulo?";
export const RESULTS = ["21 °C in Zürich", "rain in São Paulo"];

const base = (environment) => `${testbed.gateway}/${environment}/v1`;

async function joined(pieces) {
  let text = "";
  for await (const piece of pieces) text += piece;
  return text;
}

async function assertChargedAsReported(measured, requests) {
  const { charged, seen } = await measured();
  assert.equal(seen.requests, requests);
  for (const kind of ["requests", "prompt_tokens", "completion_tokens"]) assert.equal(charged[kind], seen[kind], kind);
  assert.ok(seen.prompt_tokens > 0 && seen.completion_tokens > 0);
  assert.equal(charged.total_tokens, seen.prompt_tokens + seen.completion_tokens);
  return charged;
}

function assertRefusal({ status, code, type, headers }) {
  assert.deepEqual({ status, code, type }, { status: 429, code: "rate_limit_exceeded", type: "tokens" });
  assert.equal(headers["x-tollgate-error"], "rate_limit_exceeded");
  assert.equal(headers["x-should-retry"], "false");
  // The quota refills room for one answer in a quarter of the period.
  for (const [name, unit] of [["retry-after", 1], ["retry-after-ms", 1000]]) {
    const wait = Number(headers[name]) / unit;
    assert.ok(wait > 800 && wait <= 900, `${name}: ${wait}`);
  }
}

/**
 * `sdk` implements:
 *   client(baseURL, key, retries)       returns a client of the SDK; `retries` undefined: the default of the SDK
 *   chat(client, text)                  returns the text of the answer
 *   stream(client, text)                yields the pieces of the answer; closing the generator closes the stream
 *   tools(client), streamTools(client)  return { calls: [{ name, arguments }], answer }: the tool calls, and the text of
 *                                       the answer to their RESULTS
 *   describe(error)                     returns { status, code, type, headers, message } of an error of the SDK
 *   isCutStream(error), isCutAnswer(error)
 *   honoursRetryHeaders                 whether the SDK honours `x-should-retry: false`
 */
export function contract(name, sdk) {
  const roomyClient = () => sdk.client(base("roomy"), testbed.key, 0);

  const checkTools = async (send) => {
    const measured = await startMeasurement("roomy");
    const { calls, answer } = await send(roomyClient());
    assert.deepEqual(calls, testbed.calls);
    assert.equal(answer, RESULTS.join(" and "));
    await assertChargedAsReported(measured, 2);
  };

  // Requests that fit the quota succeed. The others raise an error and never reach the upstream.
  const checkBurst = async (send) => {
    await refill("burst");
    const measured = await startMeasurement("burst");
    const client = sdk.client(base("burst"), "any", sdk.honoursRetryHeaders ? undefined : 0);
    const outcomes = await Promise.allSettled(Array.from({ length: testbed.parallel }, () => send(client)));
    const refusals = outcomes.filter((outcome) => outcome.status === "rejected");
    assert.equal(refusals.length, testbed.parallel - testbed.room);
    for (const { reason } of refusals) assertRefusal(sdk.describe(reason));
    for (const { status, value } of outcomes) if (status === "fulfilled") assert.equal(value, "Hello there");
    const { rejected } = await assertChargedAsReported(measured, testbed.room);
    assert.equal(rejected, refusals.length);
  };

  describe(name, { timeout: 60_000 }, () => {
    test("chat", async () => {
      const measured = await startMeasurement("roomy");
      assert.equal(await sdk.chat(roomyClient(), HELLO), "Hello there");
      await assertChargedAsReported(measured, 1);
    });

    test("streaming chat", async () => {
      const measured = await startMeasurement("roomy");
      const pieces = [];
      for await (const piece of sdk.stream(roomyClient(), HELLO)) if (piece) pieces.push(piece);
      assert.deepEqual(pieces, testbed.text);
      await assertChargedAsReported(measured, 1);
    });

    test("tools", () => checkTools(sdk.tools));

    test("streaming tools", () => checkTools(sdk.streamTools));

    test("a burst is limited by the quota", () => checkBurst((client) => sdk.chat(client, HELLO)));

    test("a burst of streams is limited by the quota", () => checkBurst((client) => joined(sdk.stream(client, HELLO))));

    test("a retry waits until there is room", async () => {
      await refill("patient");
      const measured = await startMeasurement("patient");
      const client = sdk.client(base("patient"), "any", 3);
      assert.equal(await sdk.chat(client, HELLO), "Hello there");
      const started = Date.now();
      assert.equal(await joined(sdk.stream(client, HELLO)), "Hello there");
      const waited = (Date.now() - started) / 1000;
      assert.ok(waited > testbed.period / 2 && waited < 3 * testbed.period, `${waited} s`);
      const { rejected } = await assertChargedAsReported(measured, 2);
      assert.equal(rejected, 1, "the SDK did not wait for the time in retry-after");
    });

    test("an interrupted stream raises an error", async () => {
      const measured = await startMeasurement("roomy");
      let received = "";
      const reading = async () => {
        for await (const piece of sdk.stream(roomyClient(), CUT)) received += piece;
      };
      await assert.rejects(reading, (error) => sdk.isCutStream(error) && /broke off/.test(sdk.describe(error).message));
      assert.equal(received, testbed.text[0]);
      const { charged, seen } = await measured();
      assert.deepEqual([charged.requests, seen.requests], [1, 1]);
      assert.ok(charged.prompt_tokens > 0 && charged.completion_tokens > 0, JSON.stringify(charged));
    });

    test("an interrupted answer raises an error", async () => {
      const measured = await startMeasurement("roomy");
      await assert.rejects(sdk.chat(roomyClient(), CUT), sdk.isCutAnswer);
      assert.equal((await measured()).charged.requests, 1);
    });

    test("a cancelled stream is cancelled upstream", async () => {
      const measured = await startMeasurement("roomy");
      const { disconnects } = await stats();
      let received = 0;
      for await (const piece of sdk.stream(roomyClient(), SLOW)) {
        received += piece === " word" ? 1 : 0;
        if (received === 3) break;
      }
      const closed = Date.now();
      while ((await stats()).disconnects === disconnects) {
        assert.ok(Date.now() - closed < 1000, "the upstream still sends");
        await sleep(10);
      }
      const { charged, seen } = await measured();
      assert.deepEqual([charged.requests, seen.requests], [1, 1]);
      assert.ok(charged.prompt_tokens > 0);
      // The charge is the text received before the close: at least what the SDK has returned.
      const counted = charged.completion_tokens;
      assert.ok(counted >= 3 && counted <= seen.words, `${counted} of ${seen.words}`);
    });

    test("a bad key is an authentication error", async () => {
      const measured = await startMeasurement("roomy");
      for (const send of [sdk.chat, (...args) => joined(sdk.stream(...args))]) {
        await assert.rejects(send(sdk.client(base("roomy"), "wrong", 2), HELLO), (error) => {
          const { status, code } = sdk.describe(error);
          assert.deepEqual({ status, code }, { status: 401, code: "invalid_api_key" });
          return true;
        });
      }
      assert.equal((await measured()).seen.requests, 0);
    });
  });
}
