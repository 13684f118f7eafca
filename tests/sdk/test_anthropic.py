"""The `anthropic` package: Messages."""

import unittest

import anthropic
from contract import QUESTION, Contract

MODEL = "claude-sonnet-5"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"name": "weather", "description": "Returns the weather", "input_schema": SCHEMA}


class Messages(Contract, unittest.TestCase):
    api = "anthropic"
    rate_limit_error = anthropic.RateLimitError
    authentication_error = anthropic.AuthenticationError
    cut_stream_error = anthropic.APIError
    cut_answer_error = anthropic.APIConnectionError

    def client(self, environment, key, retries):
        options = {} if retries is None else {"max_retries": retries}
        return anthropic.Anthropic(base_url=self.base(environment), api_key=key, **options)

    def request(self, text, **options):
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        return {"model": MODEL, "max_tokens": 100, "messages": messages, **options}

    def chat(self, client, text, **options):
        return client.messages.create(**self.request(text, **options)).content[0].text

    def stream(self, client, text):
        with client.messages.stream(**self.request(text)) as stream:
            yield from stream.text_stream

    def calls_and_reply(self, client, message):
        self.assertEqual(message.stop_reason, "tool_use")

        def send_back(results):
            answers = [
                {"type": "tool_result", "tool_use_id": block.id, "content": result}
                for block, result in zip(message.content, results)
            ]
            question = {"role": "user", "content": QUESTION}
            tool_calls = {"role": "assistant", "content": message.content}
            return self.chat(client, [question, tool_calls, {"role": "user", "content": answers}], tools=[TOOL])

        return [(block.name, block.input) for block in message.content], send_back

    def tools(self, client):
        return self.calls_and_reply(client, client.messages.create(**self.request(QUESTION, tools=[TOOL])))

    def stream_tools(self, client):
        with client.messages.stream(**self.request(QUESTION, tools=[TOOL])) as stream:
            return self.calls_and_reply(client, stream.get_final_message())

    def check_refusal(self, error):
        self.assertEqual(error.body["error"]["type"], "rate_limit_error")
        self.assertEqual([quota["kind"] for quota in error.body["error"]["quotas"]], ["total_tokens"])
        self.check_refusal_headers(error.response.headers)


if __name__ == "__main__":
    unittest.main(verbosity=2)
