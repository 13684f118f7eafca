"""What the user of an SDK is promised, whichever it is. Each `test_*.py` says how its SDK does these things."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import house
import upstream

HELLO = "Say hello"
CUT, SLOW = f"[cut] {HELLO}", f"[slow] {HELLO}"
QUESTION = "How is the weather in Zürich and in São Paulo?"
RESULTS = ["21 °C in Zürich", "rain in São Paulo"]


class Contract:
    """Mixed into a `unittest.TestCase`, which has:

    client(environment, key, retries)   a client of the SDK
    chat(client, text)                  the answer's text
    stream(client, text)                a generator of the pieces of it; closing it closes the stream
    tools(client), stream_tools(client) the calls [(name, arguments)], and a function that sends their results
                                        back, for the answer's text
    check_refusal(error)                asserts that it says: too many tokens, try later
    """

    api = "openai"
    rate_limit_error = authentication_error = cut_stream_error = cut_answer_error = None
    # Whether it heeds `x-should-retry: false`, and waits as long as `retry-after` says.
    knows_when_to_retry = True

    @classmethod
    def setUpClass(cls):
        cls.house = house.House(cls.api)

    @classmethod
    def tearDownClass(cls):
        cls.house.close()

    def tearDown(self):
        self.assertEqual(self.house.account()["faults"], [])

    def base(self, environment):
        return f"{self.house.address}/{environment}"

    def roomy(self):
        return self.client("roomy", house.KEY, 0)

    def assert_charged_as_reported(self, watch, requests):
        charged, seen = watch()
        self.assertEqual(seen["requests"], requests)
        for kind in ["requests", "prompt_tokens", "completion_tokens"]:
            self.assertEqual(charged[kind], seen[kind], kind)
        self.assertGreater(seen["prompt_tokens"] * seen["completion_tokens"], 0)
        self.assertEqual(charged["total_tokens"], seen["prompt_tokens"] + seen["completion_tokens"])

    def test_chat(self):
        watch = self.house.watch("roomy")
        self.assertEqual(self.chat(self.roomy(), HELLO), "Hello there")
        self.assert_charged_as_reported(watch, 1)

    def test_streaming_chat(self):
        watch = self.house.watch("roomy")
        self.assertEqual([piece for piece in self.stream(self.roomy(), HELLO) if piece], upstream.TEXT)
        self.assert_charged_as_reported(watch, 1)

    def check_tools(self, ask):
        watch = self.house.watch("roomy")
        calls, send_back = ask(self.roomy())
        self.assertEqual(calls, upstream.CALLS)
        self.assertEqual(send_back(RESULTS), " and ".join(RESULTS))
        self.assert_charged_as_reported(watch, 2)

    def test_tools(self):
        self.check_tools(self.tools)

    def test_streaming_tools(self):
        self.check_tools(self.stream_tools)

    def check_burst(self, ask):
        """As many as there is room for get through, the others raise, and nothing of them goes upstream."""
        self.house.refill("burst")
        watch = self.house.watch("burst")
        # As it comes out of the box, the SDK would retry.
        client = self.client("burst", "any", None if self.knows_when_to_retry else 0)
        start = threading.Barrier(house.PARALLEL)

        def one(_):
            start.wait(10)
            try:
                return ask(client)
            except self.rate_limit_error as error:
                return error

        started = time.monotonic()
        with ThreadPoolExecutor(house.PARALLEL) as pool:
            outcomes = list(pool.map(one, range(house.PARALLEL)))
        self.assertLess(time.monotonic() - started, 10, "it waited, or retried, in vain")
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        self.assertEqual([o for o in outcomes if o not in refusals], ["Hello there"] * house.ROOM)
        refused = house.PARALLEL - house.ROOM
        self.assertEqual(len(refusals), refused)
        for error in refusals:
            self.check_refusal(error)
        self.assert_charged_as_reported(watch, house.ROOM)
        self.assertEqual(watch()[0]["rejected"], refused)

    def check_refusal_headers(self, headers):
        self.assertEqual((headers["x-tollgate-error"], headers["x-should-retry"]), ("rate_limit_exceeded", "false"))
        # One answer's room refills in a quarter of the period.
        self.assertTrue(800 < int(headers["retry-after"]) <= 900, headers)
        self.assertTrue(800_000 < int(headers["retry-after-ms"]) <= 900_000, headers)

    def test_a_burst(self):
        self.check_burst(lambda client: self.chat(client, HELLO))

    def test_a_burst_of_streams(self):
        self.check_burst(lambda client: "".join(self.stream(client, HELLO)))

    def test_a_retry_comes_when_there_is_room(self):
        self.house.refill("patient")
        watch = self.house.watch("patient")
        client = self.client("patient", "any", 3)
        self.assertEqual(self.chat(client, HELLO), "Hello there")
        started = time.monotonic()
        self.assertEqual("".join(self.stream(client, HELLO)), "Hello there")
        waited = time.monotonic() - started
        self.assertTrue(house.PERIOD / 2 < waited < 3 * house.PERIOD, waited)
        self.assert_charged_as_reported(watch, 2)
        if self.knows_when_to_retry:
            self.assertEqual(watch()[0]["rejected"], 1, "it did not wait as long as it was told")

    def test_a_stream_that_is_cut_raises(self):
        watch = self.house.watch("roomy")
        received = []
        with self.assertRaises(self.cut_stream_error) as raised:
            for piece in self.stream(self.roomy(), CUT):
                received.append(piece)
        self.assertEqual("".join(received), upstream.TEXT[0])
        self.assertIn("broke off", str(raised.exception))
        charged, seen = watch()
        self.assertEqual((charged["requests"], seen["requests"]), (1, 1))
        self.assertTrue(charged["prompt_tokens"] > 0 and charged["completion_tokens"] > 0, charged)

    def test_an_answer_that_is_cut_raises(self):
        watch = self.house.watch("roomy")
        with self.assertRaises(self.cut_answer_error):
            self.chat(self.roomy(), CUT)
        self.assertEqual(watch()[0]["requests"], 1)

    def test_a_cancelled_stream_ends_upstream_too(self):
        watch = self.house.watch("roomy")
        stream = self.stream(self.roomy(), SLOW)
        received = list(itertools.islice((piece for piece in stream if piece), 3))
        self.assertEqual(received, [" word"] * 3)
        stream.close()
        closed = time.monotonic()
        while self.house.account()["hangups"] == watch.before[1]["hangups"]:
            self.assertLess(time.monotonic() - closed, 1, "the upstream goes on")
            time.sleep(0.01)
        charged, seen = watch()
        self.assertEqual((charged["requests"], seen["requests"]), (1, 1))
        self.assertGreater(charged["prompt_tokens"], 0)
        # What came in before it was closed: at least what the SDK has given out, and what was reported at first. Of a
        # vocabulary that is not public it is guessed by how much finer it cuts.
        most = 2 * seen["words"] + 1
        self.assertTrue(3 <= charged["completion_tokens"] <= most, (charged, seen))

    def test_a_bad_key_is_an_authentication_error(self):
        seen = self.house.account()["requests"]
        for ask in [self.chat, lambda client, text: list(self.stream(client, text))]:
            with self.assertRaises(self.authentication_error) as raised:
                ask(self.client("roomy", "wrong", 2), HELLO)
            self.assertIn("not valid for this gateway", str(raised.exception))
        self.assertEqual(self.house.account()["requests"], seen)
