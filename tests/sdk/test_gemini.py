"""The `google-genai` package: generateContent and streamGenerateContent."""

import unittest

import httpx2
from contract import QUESTION, Contract
from google import genai
from google.genai import errors, types

MODEL = "gemini-2.5-flash"
PARAMETERS = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}, "days": {"type": "INTEGER"}}}
TOOLS = types.GenerateContentConfig(
    tools=[{"function_declarations": [{"name": "weather", "description": "Returns the weather", "parameters": PARAMETERS}]}]
)


class Gemini(Contract, unittest.TestCase):
    api = "gemini"
    rate_limit_error = authentication_error = errors.ClientError
    cut_stream_error = errors.ServerError
    cut_answer_error = httpx2.RemoteProtocolError
    honours_retry_headers = False

    def client(self, environment, key, retries):
        retry = types.HttpRetryOptions(attempts=(retries or 0) + 1, initial_delay=1, http_status_codes=[429])
        options = types.HttpOptions(base_url=self.base(environment), retry_options=retry)
        return genai.Client(api_key=key, vertexai=False, http_options=options)

    def chat(self, client, text):
        return client.models.generate_content(model=MODEL, contents=text).text

    def stream(self, client, text):
        for chunk in client.models.generate_content_stream(model=MODEL, contents=text):
            yield chunk.text or ""

    def calls_and_reply(self, client, parts):
        calls = [part.function_call for part in parts if part.function_call]

        def send_back(results):
            answers = [
                types.Part.from_function_response(name=call.name, response={"result": result})
                for call, result in zip(calls, results)
            ]
            question = types.UserContent(QUESTION)
            contents = [question, types.ModelContent(parts), types.UserContent(answers)]
            return client.models.generate_content(model=MODEL, contents=contents, config=TOOLS).text

        return [(call.name, call.args) for call in calls], send_back

    def tools(self, client):
        answer = client.models.generate_content(model=MODEL, contents=QUESTION, config=TOOLS)
        return self.calls_and_reply(client, answer.candidates[0].content.parts)

    def stream_tools(self, client):
        chunks = client.models.generate_content_stream(model=MODEL, contents=QUESTION, config=TOOLS)
        parts = [part for chunk in chunks for part in chunk.candidates[0].content.parts]
        return self.calls_and_reply(client, [part for part in parts if part.function_call])

    def check_refusal(self, error):
        self.assertEqual((error.code, error.status), (429, "RESOURCE_EXHAUSTED"))
        details = {detail["@type"].rpartition(".")[2]: detail for detail in error.details["error"]["details"]}
        self.assertEqual(details["ErrorInfo"]["reason"], "RATE_LIMIT_EXCEEDED")
        self.assertRegex(details["RetryInfo"]["retryDelay"], r"^[89]\d\ds$")
        self.check_refusal_headers(error.response.headers)


if __name__ == "__main__":
    unittest.main(verbosity=2)
