// The AI SDK (`ai` with `@ai-sdk/openai`): chat completions and Responses.

import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, generateText, RetryError, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { testbed } from "./testbed.mjs";
import { contract, QUESTION, RESULTS } from "./contract.mjs";

const MODEL = "gpt-4o";

const weather = tool({
  description: "Returns the weather",
  inputSchema: z.object({ city: z.string(), days: z.number() }),
  execute: ({ city }) => RESULTS[testbed.calls.findIndex((call) => call.arguments.city === city)],
});
const withTools = { prompt: QUESTION, tools: { weather }, stopWhen: stepCountIs(2) };

// The answer to the results, which the SDK sends itself, and the tool calls of the first answer.
function outcome(steps, answer) {
  return { calls: steps[0].toolCalls.map(({ toolName, input }) => ({ name: toolName, arguments: input })), answer };
}

// The SDK reports errors as parts of the stream and to onError, which prints them by default.
async function* parts(options) {
  const stop = new AbortController();
  try {
    for await (const part of streamText({ ...options, abortSignal: stop.signal, onError() {} }).fullStream) {
      if (part.type === "error") throw part.error;
      yield part;
    }
  } finally {
    stop.abort();
  }
}

const sdk = (choose) => ({
  // The SDK does not read `x-should-retry`.
  honoursRetryHeaders: false,
  client: (baseURL, apiKey, maxRetries) => ({ model: choose(createOpenAI({ baseURL, apiKey })), maxRetries }),
  chat: async (client, text) => (await generateText({ ...client, prompt: text })).text,
  async *stream(client, text) {
    for await (const part of parts({ ...client, prompt: text })) if (part.type === "text-delta") yield part.text;
  },
  async tools(client) {
    const { steps, text } = await generateText({ ...client, ...withTools });
    return outcome(steps, text);
  },
  async streamTools(client) {
    const result = streamText({ ...client, ...withTools });
    return outcome(await result.steps, await result.text);
  },
  describe(error) {
    const last = RetryError.isInstance(error) ? error.lastError : error;
    if (!APICallError.isInstance(last)) return { message: last.message ?? JSON.stringify(last) };
    const { code, type } = JSON.parse(last.responseBody).error;
    return { status: last.statusCode, code, type, message: last.message, headers: last.responseHeaders };
  },
  // The error event as received (chat completions), or converted to an error of the SDK (Responses).
  isCutStream: (error) => (error.data?.error ?? error).code === "upstream_disconnected",
  isCutAnswer: (error) => APICallError.isInstance(error),
});

contract("AI SDK, chat completions", sdk((provider) => provider.chat(MODEL)));
contract("AI SDK, Responses", sdk((provider) => provider.responses(MODEL)));
