// What the user of an SDK is promised, whichever it is: the tests of ../contract.py, for Node.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { account, house, refill, watch } from "./house.mjs";

const HELLO = "Say hello";
const CUT = `[cut] ${HELLO}`;
const SLOW = `[slow] ${HELLO}`;
export const QUESTION = "How is the weather in Zürich and in São Paulo?";
export const RESULTS = ["21 °C in Zürich", "rain in São Paulo"];

const base = (environment) => `${house.gateway}/${environment}/v1`;

async function joined(pieces) {
  let text = "";
  for await (const piece of pieces) text += piece;
  return text;
}

async function assertChargedAsReported(look, requests) {
  const { charged, seen } = await look();
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
  // One answer's room refills in a quarter of the period.
  for (const [name, unit] of [["retry-after", 1], ["retry-after-ms", 1000]]) {
    const wait = Number(headers[name]) / unit;
    assert.ok(wait > 800 && wait <= 900, `${name}: ${wait}`);
  }
}

/**
 * `sdk` has:
 *   client(baseURL, key, retries)     a client, or what stands for one; `retries` undefined: the SDK's own
 *   chat(client, text)                the answer's text
 *   stream(client, text)              an asynchronous generator of its pieces; closing it closes the stream
 *   tools(client), streamTools(client)  { calls: [{ name, arguments }], answer }: the calls, and the text that
 *                                     came of their RESULTS
 *   told(error)                       { status, code, type, headers, message } of an error of the SDK
 *   isCutStream(error), isCutAnswer(error)
 *   heedsShouldRetry                  whether it knows `x-should-retry: false`
 */
export function contract(name, sdk) {
  const roomy = () => sdk.client(base("roomy"), house.key, 0);

  const checkTools = async (ask) => {
    const look = await watch("roomy");
    const { calls, answer } = await ask(roomy());
    assert.deepEqual(calls, house.calls);
    assert.equal(answer, RESULTS.join(" and "));
    await assertChargedAsReported(look, 2);
  };

  // As many as there is room for get through, the others raise, and nothing of them goes upstream.
  const checkBurst = async (ask) => {
    await refill("burst");
    const look = await watch("burst");
    const client = sdk.client(base("burst"), "any", sdk.heedsShouldRetry ? undefined : 0);
    const outcomes = await Promise.allSettled(Array.from({ length: house.parallel }, () => ask(client)));
    const refusals = outcomes.filter((outcome) => outcome.status === "rejected");
    assert.equal(refusals.length, house.parallel - house.room);
    for (const { reason } of refusals) assertRefusal(sdk.told(reason));
    for (const { status, value } of outcomes) if (status === "fulfilled") assert.equal(value, "Hello there");
    const { rejected } = await assertChargedAsReported(look, house.room);
    assert.equal(rejected, refusals.length);
  };

  describe(name, { timeout: 60_000 }, () => {
    test("chat", async () => {
      const look = await watch("roomy");
      assert.equal(await sdk.chat(roomy(), HELLO), "Hello there");
      await assertChargedAsReported(look, 1);
    });

    test("streaming chat", async () => {
      const look = await watch("roomy");
      const pieces = [];
      for await (const piece of sdk.stream(roomy(), HELLO)) if (piece) pieces.push(piece);
      assert.deepEqual(pieces, house.text);
      await assertChargedAsReported(look, 1);
    });

    test("tools", () => checkTools(sdk.tools));

    test("streaming tools", () => checkTools(sdk.streamTools));

    test("a burst", () => checkBurst((client) => sdk.chat(client, HELLO)));

    test("a burst of streams", () => checkBurst((client) => joined(sdk.stream(client, HELLO))));

    test("a retry comes when there is room", async () => {
      await refill("patient");
      const look = await watch("patient");
      const client = sdk.client(base("patient"), "any", 3);
      assert.equal(await sdk.chat(client, HELLO), "Hello there");
      const started = Date.now();
      assert.equal(await joined(sdk.stream(client, HELLO)), "Hello there");
      const waited = (Date.now() - started) / 1000;
      assert.ok(waited > house.period / 2 && waited < 3 * house.period, `${waited} s`);
      const { rejected } = await assertChargedAsReported(look, 2);
      assert.equal(rejected, 1, "it did not wait as long as it was told");
    });

    test("a stream that is cut raises", async () => {
      const look = await watch("roomy");
      let received = "";
      const reading = async () => {
        for await (const piece of sdk.stream(roomy(), CUT)) received += piece;
      };
      await assert.rejects(reading, (error) => sdk.isCutStream(error) && /broke off/.test(sdk.told(error).message));
      assert.equal(received, house.text[0]);
      const { charged, seen } = await look();
      assert.deepEqual([charged.requests, seen.requests], [1, 1]);
      assert.ok(charged.prompt_tokens > 0 && charged.completion_tokens > 0, JSON.stringify(charged));
    });

    test("an answer that is cut raises", async () => {
      const look = await watch("roomy");
      await assert.rejects(sdk.chat(roomy(), CUT), sdk.isCutAnswer);
      assert.equal((await look()).charged.requests, 1);
    });

    test("a cancelled stream ends upstream too", async () => {
      const look = await watch("roomy");
      const { hangups } = await account();
      let received = 0;
      for await (const piece of sdk.stream(roomy(), SLOW)) {
        received += piece === " word" ? 1 : 0;
        if (received === 3) break;
      }
      const closed = Date.now();
      while ((await account()).hangups === hangups) {
        assert.ok(Date.now() - closed < 1000, "the upstream goes on");
        await sleep(10);
      }
      const { charged, seen } = await look();
      assert.deepEqual([charged.requests, seen.requests], [1, 1]);
      assert.ok(charged.prompt_tokens > 0);
      // What came in before it was closed: at least what the SDK has given out.
      const counted = charged.completion_tokens;
      assert.ok(counted >= 3 && counted <= seen.words, `${counted} of ${seen.words}`);
    });

    test("a bad key is an authentication error", async () => {
      const look = await watch("roomy");
      for (const ask of [sdk.chat, (...args) => joined(sdk.stream(...args))]) {
        await assert.rejects(ask(sdk.client(base("roomy"), "wrong", 2), HELLO), (error) => {
          const { status, code } = sdk.told(error);
          assert.deepEqual({ status, code }, { status: 401, code: "invalid_api_key" });
          return true;
        });
      }
      assert.equal((await look()).seen.requests, 0);
    });
  });
}
