"""The `openai` package: chat completions, Responses, embeddings, models."""

import asyncio
import json
import unittest

import testbed
import openai
from contract import HELLO, QUESTION, Contract

MODEL = "gpt-4o"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION = {"name": "weather", "description": "Returns the weather", "parameters": PARAMETERS}


class OpenAi(Contract):
    rate_limit_error = openai.RateLimitError
    authentication_error = openai.AuthenticationError
    cut_stream_error = openai.APIError
    cut_answer_error = openai.APIConnectionError

    def client(self, environment, key, retries):
        options = {} if retries is None else {"max_retries": retries}
        return openai.OpenAI(base_url=f"{self.base(environment)}/v1", api_key=key, **options)

    def check_refusal(self, error):
        self.assertEqual((error.code, error.type), ("rate_limit_exceeded", "tokens"))
        self.assertEqual([quota["kind"] for quota in error.body["quotas"]], ["total_tokens"])
        self.check_refusal_headers(error.response.headers)


class Chats(OpenAi, unittest.TestCase):
    tool = {"type": "function", "function": FUNCTION}

    def create(self, client, text, **options):
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=MODEL, messages=messages, **options)

    def chat(self, client, text):
        return self.create(client, text).choices[0].message.content

    def stream(self, client, text):
        with self.create(client, text, stream=True) as stream:
            for chunk in stream:
                # The gateway requested usage for itself and must withhold the chunk.
                self.assertTrue(chunk.choices)
                yield chunk.choices[0].delta.content or ""

    def calls_and_reply(self, client, message):
        def send_back(results):
            answers = [
                {"role": "tool", "tool_call_id": call["id"], "content": result}
                for call, result in zip(message["tool_calls"], results)
            ]
            messages = [{"role": "user", "content": QUESTION}, message, *answers]
            answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[self.tool])
            return answer.choices[0].message.content

        functions = [call["function"] for call in message["tool_calls"]]
        return [(f["name"], json.loads(f["arguments"])) for f in functions], send_back

    def tools(self, client):
        answer = self.create(client, QUESTION, tools=[self.tool])
        self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
        return self.calls_and_reply(client, answer.choices[0].message.to_dict())

    def stream_tools(self, client):
        messages = [{"role": "user", "content": QUESTION}]
        with client.chat.completions.stream(model=MODEL, messages=messages, tools=[self.tool]) as stream:
            message = stream.get_final_completion().choices[0].message
        calls = [call.to_dict() for call in message.tool_calls]
        for call in calls:
            call["function"].pop("parsed_arguments", None)
        return self.calls_and_reply(client, {"role": "assistant", "tool_calls": calls})

    def test_a_stream_contains_usage_if_the_caller_requests_it(self):
        options = {"include_usage": True}
        chunks = list(self.create(self.roomy_client(), HELLO, stream=True, stream_options=options))
        self.assertEqual((chunks[-1].choices, chunks[-1].usage.total_tokens), ([], testbed.COST))

    def test_a_cancelled_asynchronous_stream_is_cancelled_upstream(self):
        measurement = self.testbed.measure("roomy")

        async def cancel():
            client = openai.AsyncOpenAI(base_url=f"{self.base('roomy')}/v1", api_key=testbed.KEY)
            first = asyncio.Event()

            async def read():
                async for _ in await self.create(client, "[slow]", stream=True):
                    first.set()

            task = asyncio.create_task(read())
            await first.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.close()

        asyncio.run(cancel())
        charged, seen = measurement.result()
        self.assertEqual((charged["requests"], seen["requests"]), (1, 1))
        self.assertLess(seen["words"], 30)

    def test_embeddings(self):
        measurement = self.testbed.measure("roomy")
        answer = self.roomy_client().embeddings.create(
            model="text-embedding-3-small", input=["a", "b"], encoding_format="float"
        )
        self.assertEqual([item.embedding for item in answer.data], [[0.5, -0.25]] * 2)
        charged, seen = measurement.result()
        self.assertEqual((charged["prompt_tokens"], charged["completion_tokens"]), (seen["prompt_tokens"], 0))

    def test_models(self):
        measurement = self.testbed.measure("roomy")
        self.assertEqual([model.id for model in self.roomy_client().models.list()], [MODEL])
        self.assertEqual(measurement.result()[0]["requests"], 0)

    def test_rate_limit_headers_show_what_is_left(self):
        answer = self.roomy_client().chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": HELLO}]
        )
        self.assertEqual(answer.headers["x-ratelimit-limit-tokens"], "1000000")
        self.assertTrue(0 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 1_000_000)
        self.assertEqual(answer.headers["x-tollgate-environment"], "roomy")

    def test_a_bad_request_names_its_parameter(self):
        with self.assertRaises(openai.BadRequestError) as raised:
            self.create(self.roomy_client(), HELLO, max_tokens=-1)
        self.assertEqual((raised.exception.code, raised.exception.param), ("invalid_value", "max_tokens"))


class Responses(OpenAi, unittest.TestCase):
    tool = {"type": "function", "strict": False, **FUNCTION}

    def create(self, client, text, **options):
        return client.responses.create(model=MODEL, input=text, **options)

    def chat(self, client, text):
        return self.create(client, text).output_text

    def stream(self, client, text):
        with self.create(client, text, stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    yield event.delta

    def calls_and_reply(self, client, response):
        calls = [item for item in response.output if item.type == "function_call"]

        def send_back(results):
            answers = [
                {"type": "function_call_output", "call_id": call.call_id, "output": result}
                for call, result in zip(calls, results)
            ]
            # The package adds `parsed_arguments`, which is not part of the API.
            items = [item.to_dict() for item in calls]
            for item in items:
                item.pop("parsed_arguments", None)
            return self.create(client, [{"role": "user", "content": QUESTION}, *items, *answers], tools=[self.tool]).output_text

        return [(call.name, json.loads(call.arguments)) for call in calls], send_back

    def tools(self, client):
        return self.calls_and_reply(client, self.create(client, QUESTION, tools=[self.tool]))

    def stream_tools(self, client):
        with client.responses.stream(model=MODEL, input=QUESTION, tools=[self.tool]) as stream:
            return self.calls_and_reply(client, stream.get_final_response())


if __name__ == "__main__":
    unittest.main(verbosity=2)
