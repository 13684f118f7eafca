"""LangChain's `ChatOpenAI`, with chat completions and with Responses."""

import unittest

import openai
from contract import QUESTION, Contract
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def weather(city: str, days: int) -> str:
    """Returns the weather."""
    raise NotImplementedError


class LangChain(Contract):
    rate_limit_error = openai.RateLimitError
    authentication_error = openai.AuthenticationError
    cut_stream_error = openai.APIError
    cut_answer_error = openai.APIConnectionError
    uses_responses = False

    def client(self, environment, key, retries):
        options = {} if retries is None else {"max_retries": retries}
        base_url = f"{self.base(environment)}/v1"
        return ChatOpenAI(
            model="gpt-4o", base_url=base_url, api_key=key, use_responses_api=self.uses_responses, **options
        )

    def chat(self, client, text):
        return client.invoke(text).text

    def stream(self, client, text):
        for chunk in client.stream(text):
            yield chunk.text

    def calls_and_reply(self, client, message):
        def send_back(results):
            answers = [
                ToolMessage(result, tool_call_id=call["id"]) for call, result in zip(message.tool_calls, results)
            ]
            return client.invoke([HumanMessage(QUESTION), message, *answers]).text

        return [(call["name"], call["args"]) for call in message.tool_calls], send_back

    def tools(self, client):
        client = client.bind_tools([weather])
        return self.calls_and_reply(client, client.invoke(QUESTION))

    def stream_tools(self, client):
        client = client.bind_tools([weather])
        message = None
        for chunk in client.stream(QUESTION):
            message = chunk if message is None else message + chunk
        return self.calls_and_reply(client, message)

    def check_refusal(self, error):
        self.assertEqual((error.code, error.type), ("rate_limit_exceeded", "tokens"))
        self.check_refusal_headers(error.response.headers)


class Chats(LangChain, unittest.TestCase):
    pass


class Responses(LangChain, unittest.TestCase):
    uses_responses = True


if __name__ == "__main__":
    unittest.main(verbosity=2)
