"""The tests that every SDK must pass. Each `test_*.py` implements the operations with its SDK."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import testbed
import upstream

HELLO = "Say hello"
CUT, SLOW = f"[cut] {HELLO}", f"[slow] {HELLO}"
QUESTION = "How is the weather in Zürich and in São Paulo?"
RESULTS = ["21 °C in Zürich", "rain in São Paulo"]


class Contract:
    """A mix-in for a `unittest.TestCase`, which implements:

    client(environment, key, retries)   returns a client of the SDK; retries None: the default of the SDK
    chat(client, text)                  returns the text of the answer
    stream(client, text)                yields the pieces of the answer; closing the generator closes the stream
    tools(client), stream_tools(client) return the tool calls [(name, arguments)], and a function that sends their
                                        results and returns the text of the answer
    check_refusal(error)                asserts that the error is a denial by a token quota
    """

    api = "openai"
    rate_limit_error = authentication_error = cut_stream_error = cut_answer_error = None
    # Whether the SDK honours `x-should-retry: false` and waits for the time in `retry-after`.
    honours_retry_headers = True

    @classmethod
    def setUpClass(cls):
        cls.testbed = testbed.Testbed(cls.api)

    @classmethod
    def tearDownClass(cls):
        cls.testbed.close()

    def tearDown(self):
        self.assertEqual(self.testbed.stats()["faults"], [])

    def base(self, environment):
        return f"{self.testbed.address}/{environment}"

    def roomy_client(self):
        return self.client("roomy", testbed.KEY, 0)

    def assert_charged_as_reported(self, measurement, requests):
        charged, seen = measurement.result()
        self.assertEqual(seen["requests"], requests)
        for kind in ["requests", "prompt_tokens", "completion_tokens"]:
            self.assertEqual(charged[kind], seen[kind], kind)
        self.assertGreater(seen["prompt_tokens"] * seen["completion_tokens"], 0)
        self.assertEqual(charged["total_tokens"], seen["prompt_tokens"] + seen["completion_tokens"])

    def test_chat(self):
        measurement = self.testbed.measure("roomy")
        self.assertEqual(self.chat(self.roomy_client(), HELLO), "Hello there")
        self.assert_charged_as_reported(measurement, 1)

    def test_streaming_chat(self):
        measurement = self.testbed.measure("roomy")
        self.assertEqual([piece for piece in self.stream(self.roomy_client(), HELLO) if piece], upstream.TEXT)
        self.assert_charged_as_reported(measurement, 1)

    def check_tools(self, send):
        measurement = self.testbed.measure("roomy")
        calls, send_back = send(self.roomy_client())
        self.assertEqual(calls, upstream.CALLS)
        self.assertEqual(send_back(RESULTS), " and ".join(RESULTS))
        self.assert_charged_as_reported(measurement, 2)

    def test_tools(self):
        self.check_tools(self.tools)

    def test_streaming_tools(self):
        self.check_tools(self.stream_tools)

    def check_burst(self, send):
        """Requests that fit the quota succeed. The others raise an error and never reach the upstream."""
        self.testbed.refill("burst")
        measurement = self.testbed.measure("burst")
        # With its default settings the SDK would retry.
        client = self.client("burst", "any", None if self.honours_retry_headers else 0)
        start = threading.Barrier(testbed.PARALLEL)

        def one(_):
            start.wait(10)
            try:
                return send(client)
            except self.rate_limit_error as error:
                return error

        started = time.monotonic()
        with ThreadPoolExecutor(testbed.PARALLEL) as pool:
            outcomes = list(pool.map(one, range(testbed.PARALLEL)))
        self.assertLess(time.monotonic() - started, 10, "the SDK waited or retried although the quota had no room")
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        self.assertEqual([o for o in outcomes if o not in refusals], ["Hello there"] * testbed.ROOM)
        refused = testbed.PARALLEL - testbed.ROOM
        self.assertEqual(len(refusals), refused)
        for error in refusals:
            self.check_refusal(error)
        self.assert_charged_as_reported(measurement, testbed.ROOM)
        self.assertEqual(measurement.result()[0]["rejected"], refused)

    def check_refusal_headers(self, headers):
        self.assertEqual((headers["x-tollgate-error"], headers["x-should-retry"]), ("rate_limit_exceeded", "false"))
        # The quota refills room for one answer in a quarter of the period.
        self.assertTrue(800 < int(headers["retry-after"]) <= 900, headers)
        self.assertTrue(800_000 < int(headers["retry-after-ms"]) <= 900_000, headers)

    def test_a_burst_is_limited_by_the_quota(self):
        self.check_burst(lambda client: self.chat(client, HELLO))

    def test_a_burst_of_streams_is_limited_by_the_quota(self):
        self.check_burst(lambda client: "".join(self.stream(client, HELLO)))

    def test_a_retry_waits_until_there_is_room(self):
        self.testbed.refill("patient")
        measurement = self.testbed.measure("patient")
        client = self.client("patient", "any", 3)
        self.assertEqual(self.chat(client, HELLO), "Hello there")
        started = time.monotonic()
        self.assertEqual("".join(self.stream(client, HELLO)), "Hello there")
        waited = time.monotonic() - started
        self.assertTrue(testbed.PERIOD / 2 < waited < 3 * testbed.PERIOD, waited)
        self.assert_charged_as_reported(measurement, 2)
        if self.honours_retry_headers:
            self.assertEqual(measurement.result()[0]["rejected"], 1, "the SDK did not wait for the time in retry-after")

    def test_an_interrupted_stream_raises_an_error(self):
        measurement = self.testbed.measure("roomy")
        received = []
        with self.assertRaises(self.cut_stream_error) as raised:
            for piece in self.stream(self.roomy_client(), CUT):
                received.append(piece)
        self.assertEqual("".join(received), upstream.TEXT[0])
        self.assertIn("broke off", str(raised.exception))
        charged, seen = measurement.result()
        self.assertEqual((charged["requests"], seen["requests"]), (1, 1))
        self.assertTrue(charged["prompt_tokens"] > 0 and charged["completion_tokens"] > 0, charged)

    def test_an_interrupted_answer_raises_an_error(self):
        measurement = self.testbed.measure("roomy")
        with self.assertRaises(self.cut_answer_error):
            self.chat(self.roomy_client(), CUT)
        self.assertEqual(measurement.result()[0]["requests"], 1)

    def test_a_cancelled_stream_is_cancelled_upstream(self):
        measurement = self.testbed.measure("roomy")
        stream = self.stream(self.roomy_client(), SLOW)
        received = list(itertools.islice((piece for piece in stream if piece), 3))
        self.assertEqual(received, [" word"] * 3)
        stream.close()
        closed = time.monotonic()
        while self.testbed.stats()["disconnects"] == measurement.before[1]["disconnects"]:
            self.assertLess(time.monotonic() - closed, 1, "the upstream still sends")
            time.sleep(0.01)
        charged, seen = measurement.result()
        self.assertEqual((charged["requests"], seen["requests"]), (1, 1))
        self.assertGreater(charged["prompt_tokens"], 0)
        # The charge is the text received before the close: at least what the SDK has returned, and the usage reported at
        # the start. For models without a public vocabulary the gateway scales its count, by up to 2.
        maximum = 2 * seen["words"] + 1
        self.assertTrue(3 <= charged["completion_tokens"] <= maximum, (charged, seen))

    def test_a_bad_key_is_an_authentication_error(self):
        seen = self.testbed.stats()["requests"]
        for send in [self.chat, lambda client, text: list(self.stream(client, text))]:
            with self.assertRaises(self.authentication_error) as raised:
                send(self.client("roomy", "wrong", 2), HELLO)
            self.assertIn("not valid for this gateway", str(raised.exception))
        self.assertEqual(self.testbed.stats()["requests"], seen)
