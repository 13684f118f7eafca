// The AI SDK (`ai` with `@ai-sdk/openai`): chats and Responses.

import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, generateText, RetryError, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { house } from "./house.mjs";
import { contract, QUESTION, RESULTS } from "./contract.mjs";

const MODEL = "gpt-4o";

const weather = tool({
  description: "Tells the weather",
  inputSchema: z.object({ city: z.string(), days: z.number() }),
  execute: ({ city }) => RESULTS[house.calls.findIndex((call) => call.arguments.city === city)],
});
const askingTools = { prompt: QUESTION, tools: { weather }, stopWhen: stepCountIs(2) };

// What the SDK sends back itself, and the calls that it has made of the first answer.
function outcome(steps, answer) {
  return { calls: steps[0].toolCalls.map(({ toolName, input }) => ({ name: toolName, arguments: input })), answer };
}

// It tells of errors in the stream of its parts, and on onError: on the console, if nobody takes it.
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
  // It retries what it cannot know to be in vain.
  heedsShouldRetry: false,
  client: (baseURL, apiKey, maxRetries) => ({ model: choose(createOpenAI({ baseURL, apiKey })), maxRetries }),
  chat: async (client, text) => (await generateText({ ...client, prompt: text })).text,
  async *stream(client, text) {
    for await (const part of parts({ ...client, prompt: text })) if (part.type === "text-delta") yield part.text;
  },
  async tools(client) {
    const { steps, text } = await generateText({ ...client, ...askingTools });
    return outcome(steps, text);
  },
  async streamTools(client) {
    const result = streamText({ ...client, ...askingTools });
    return outcome(await result.steps, await result.text);
  },
  told(error) {
    const last = RetryError.isInstance(error) ? error.lastError : error;
    if (!APICallError.isInstance(last)) return { message: last.message ?? JSON.stringify(last) };
    const { code, type } = JSON.parse(last.responseBody).error;
    return { status: last.statusCode, code, type, message: last.message, headers: last.responseHeaders };
  },
  // The error of the stream as it came (chats), or made into one of the SDK's (Responses).
  isCutStream: (error) => (error.data?.error ?? error).code === "upstream_disconnected",
  isCutAnswer: (error) => APICallError.isInstance(error),
});

contract("AI SDK, chats", sdk((provider) => provider.chat(MODEL)));
contract("AI SDK, Responses", sdk((provider) => provider.responses(MODEL)));
