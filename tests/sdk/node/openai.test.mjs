// The `openai` package: chat completions and Responses.

import OpenAI from "openai";
import { contract, QUESTION, RESULTS } from "./contract.mjs";

const MODEL = "gpt-4o";
const USER = { role: "user", content: QUESTION };
const FUNCTION = {
  name: "weather",
  description: "Returns the weather",
  parameters: { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } } },
};

const common = {
  honoursRetryHeaders: true,
  client: (baseURL, apiKey, maxRetries) => new OpenAI({ baseURL, apiKey, maxRetries }),
  describe(error) {
    const { status, code, type, message } = error;
    const expected = { 401: OpenAI.AuthenticationError, 429: OpenAI.RateLimitError }[status] ?? OpenAI.APIError;
    if (!(error instanceof expected)) throw error;
    return { status, code, type, message, headers: Object.fromEntries(error.headers ?? []) };
  },
  isCutStream: (error) => error instanceof OpenAI.APIError,
};

const toCall = ({ name, arguments: text }) => ({ name, arguments: JSON.parse(text) });

const CHAT_TOOLS = [{ type: "function", function: FUNCTION }];

async function answerChat(client, { role, content, tool_calls }) {
  const results = tool_calls.map((call, i) => ({ role: "tool", tool_call_id: call.id, content: RESULTS[i] }));
  const messages = [USER, { role, content, tool_calls }, ...results];
  const answer = await client.chat.completions.create({ model: MODEL, messages, tools: CHAT_TOOLS });
  return { calls: tool_calls.map((call) => toCall(call.function)), answer: answer.choices[0].message.content };
}

contract("openai, chat completions", {
  ...common,
  // The SDK passes on the error of the JSON parser or of the connection.
  isCutAnswer: (error) => error instanceof Error,
  async chat(client, text) {
    const answer = await client.chat.completions.create({ model: MODEL, messages: [{ role: "user", content: text }] });
    return answer.choices[0].message.content;
  },
  async *stream(client, text) {
    const messages = [{ role: "user", content: text }];
    const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
    for await (const chunk of stream) {
      // The gateway requested usage for itself and must withhold the chunk.
      if (chunk.choices.length === 0) throw new Error("a chunk without choices");
      yield chunk.choices[0].delta.content ?? "";
    }
  },
  async tools(client) {
    const answer = await client.chat.completions.create({ model: MODEL, messages: [USER], tools: CHAT_TOOLS });
    return answerChat(client, answer.choices[0].message);
  },
  async streamTools(client) {
    const stream = client.chat.completions.stream({ model: MODEL, messages: [USER], tools: CHAT_TOOLS });
    return answerChat(client, (await stream.finalChatCompletion()).choices[0].message);
  },
});

const RESPONSES_TOOLS = [{ type: "function", strict: false, ...FUNCTION }];

async function answerResponse(client, { output }) {
  const calls = output.filter((item) => item.type === "function_call");
  const items = calls.map(({ parsed_arguments: _, ...call }) => call);
  const results = calls.map((call, i) => ({ type: "function_call_output", call_id: call.call_id, output: RESULTS[i] }));
  const input = [USER, ...items, ...results];
  const answer = await client.responses.create({ model: MODEL, input, tools: RESPONSES_TOOLS });
  return { calls: calls.map(toCall), answer: answer.output_text };
}

contract("openai, Responses", {
  ...common,
  isCutAnswer: (error) => error instanceof Error,
  chat: async (client, text) => (await client.responses.create({ model: MODEL, input: text })).output_text,
  async *stream(client, text) {
    const stream = await client.responses.create({ model: MODEL, input: text, stream: true });
    for await (const event of stream) if (event.type === "response.output_text.delta") yield event.delta;
  },
  async tools(client) {
    return answerResponse(client, await client.responses.create({ model: MODEL, input: QUESTION, tools: RESPONSES_TOOLS }));
  },
  async streamTools(client) {
    const stream = client.responses.stream({ model: MODEL, input: QUESTION, tools: RESPONSES_TOOLS });
    return answerResponse(client, await stream.finalResponse());
  },
});
