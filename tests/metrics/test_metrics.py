"""The metrics, the rules and the dashboard, as Prometheus reads and evaluates them. Grafana itself is not started."""

import json
import re
import subprocess
import tempfile
import threading
import unittest

import lab

KEY, BATCH_KEY = "key-of-the-metrics-test-1", "key-of-the-metrics-test-2"
STORE = "store: { memory: true }\n"
# Traffic of these environments reaches every panel: `production` has all kinds of owners of quotas, `tight` refuses, `shadow`
# only counts, and in `queue` requests wait.
CONFIG = f"""
upstreams: {{ backend: {{ base_url: BACKEND, api_key: sk-of-the-backend }} }}
environments:
  production:
    upstream: backend
    on_disconnect: drain
    keys:
      - {{ name: web, secret: {KEY} }}
      - {{ name: batch, secret: {BATCH_KEY}, quotas: {{ total_tokens: {{ limit: 100k, per: day }} }} }}
    model_quotas: {{ "gpt-4*": {{ requests: {{ limit: 5000, per: day }} }} }}
    quotas: {{ total_tokens: {{ limit: 1M, per: day }}, requests: {{ limit: 10k, per: minute }} }}
  tight:
    upstream: backend
    reserve: {{ completion: max_tokens, when_short: clamp }}
    quotas: {{ total_tokens: {{ limit: 90, per: day }} }}
  shadow: {{ upstream: backend, enforce: false, quotas: {{ requests: {{ limit: 1, per: day }} }} }}
  queue: {{ upstream: backend, max_in_flight: 1, reserve: {{ max_wait: 5s }} }}
"""
VARIABLES = {
    "${datasource}": "",
    "$__rate_interval": "5s",
    "$__range": "1m",
    "$environment": ".*",
    "$instance": ".*",
    "$kind": ".*",
    "$job": "tollgate",
}


def promtool(*arguments, text=None):
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, cwd=lab.PROMETHEUS)


def dashboard():
    return json.loads((lab.ROOT / "config/grafana/tollgate.json").read_text())


def expand(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


class Rules(unittest.TestCase):
    def test_the_rules_are_valid_and_pass_their_tests(self):
        for arguments in [
            ["check", "rules", "rules.yaml", "alerts.yaml"],
            ["check", "config", "prometheus.yaml"],
            ["test", "rules", "alerts_test.yaml"],
        ]:
            done = promtool(*arguments)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_alert_has_a_test(self):
        alerts = re.findall(r"- alert: (\w+)", (lab.PROMETHEUS / "alerts.yaml").read_text())
        tested = (lab.PROMETHEUS / "alerts_test.yaml").read_text()
        self.assertGreater(len(alerts), 10)
        for alert in alerts:
            self.assertRegex(tested, rf"alertname: {alert}\n\s+eval_time: \w+\n\s+exp_alerts:\n", alert)


class Dashboard(unittest.TestCase):
    """Grafana is not available here, so the structure that it reads is checked."""

    def test_panels_have_their_fields_and_do_not_overlap(self):
        board = dashboard()
        self.assertLess({"uid", "title", "panels", "templating", "schemaVersion", "time"}, set(board))
        ids, cells = set(), set()
        for panel in board["panels"]:
            self.assertNotIn(panel["id"], ids)
            ids.add(panel["id"])
            self.assertIn(panel["type"], {"row", "timeseries", "stat", "table", "bargauge"})
            place = panel["gridPos"]
            self.assertTrue(place["x"] >= 0 and place["x"] + place["w"] <= 24, panel["title"])
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    self.assertNotIn((x, y), cells, panel["title"])
                    cells.add((x, y))
            if panel["type"] == "row":
                continue
            self.assertTrue(panel["targets"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"])
            references = [target["refId"] for target in panel["targets"]]
            self.assertEqual(len(references), len(set(references)))
            for target in panel["targets"]:
                self.assertEqual(target["datasource"], {"type": "prometheus", "uid": "${datasource}"})

    def test_variables_are_declared(self):
        board = dashboard()
        declared = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval", "__range"}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
        self.assertLessEqual(used, declared)


class Stores(unittest.TestCase):
    def test_the_metrics_are_valid_with_every_store(self):
        with tempfile.TemporaryDirectory() as folder:
            rig = lab.Lab(folder)
            self.addCleanup(rig.close)
            stores = {
                "memory": STORE,
                "local": f"store: {{ path: '{folder}/local.db' }}\n",
                "redis": f"store: {{ path: '{folder}/redis.db', redis: {{ url: '{rig.redis()}' }} }}\n",
            }
            for name, store in stores.items():
                gateway = rig.gateway(name, CONFIG + "telemetry: { gen_ai_metrics: true }\n" + store)
                gateway.chat("production", "hello", KEY)
                gateway.chat("production", "hello", KEY, stream=True)
                gateway.chat("tight", "hello", max_tokens=900)
                gateway.chat("shadow", "hello")
                body = {"limit": 5000, "reason": "test"}
                lab.request(f"{gateway.admin}/api/environments/production/quotas/requests/minute", body, "PUT")
                text = gateway.metrics()
                checked = promtool("check", "metrics", text=text)
                self.assertEqual((checked.returncode, checked.stdout + checked.stderr), (0, ""), name)
                self.assertEqual("tollgate_redis_up 1\n" in text, name == "redis", name)
                self.assertIn("tollgate_nodes 1\n", text)


class RealPrometheus(unittest.TestCase):
    """Two gateways that share their quotas through Redis, and a Prometheus that scrapes them under traffic."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.rig = lab.Lab(cls.folder.name)
        cls.ended, cls.threads = threading.Event(), []
        try:
            redis = cls.rig.redis()
            cls.nodes = [
                cls.rig.gateway(
                    name, CONFIG + f"store: {{ path: '{cls.folder.name}/{name}.db', redis: {{ url: '{redis}' }} }}\n"
                )
                for name in ["one", "two"]
            ]
            body = {"limit": 20000, "reason": "test"}
            url = f"{cls.nodes[0].admin}/api/environments/production/quotas/requests/minute"
            assert lab.request(url, body, "PUT")[0] == 200
            cls.prometheus = cls.rig.prometheus(cls.nodes)
            cls.start_traffic()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.stop_traffic()
        cls.rig.close()
        cls.folder.cleanup()

    @classmethod
    def start_traffic(cls):
        """Every counter must grow while Prometheus scrapes, so the traffic begins after the first scrape and goes on."""
        lab.wait_until("the first scrape", lambda: len(cls.prometheus.query("tollgate_build_info")) == 2)

        def send(node):
            for text, fields in [("hello", {}), ("broken", {}), ("mute", {}), ("stream", {"stream": True})]:
                node.chat("production", text, KEY, **fields)
            node.chat("production", "hello", BATCH_KEY)
            node.chat("production", "hello", "wrong-key")
            node.chat("tight", "hello", max_tokens=50)
            node.chat("shadow", "hello")

        def wait_in_queue(node):
            node.chat("queue", "slow")

        def disconnect(node):
            # The gateway reads the rest of the answer without the caller.
            url = f"{node.url}/production/v1/chat/completions"
            body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "slow"}]}
            try:
                lab.request(url, body, key=KEY, timeout=0.1)
            except OSError:
                pass

        def repeat(task, node):
            while not cls.ended.wait(0.02):
                task(node)

        tasks = [(send, node) for node in cls.nodes] + [(wait_in_queue, cls.nodes[0])] * 2 + [(disconnect, cls.nodes[0])]
        cls.threads = [threading.Thread(target=repeat, args=task) for task in tasks]
        for thread in cls.threads:
            thread.start()

    @classmethod
    def stop_traffic(cls):
        cls.ended.set()
        for thread in cls.threads:
            thread.join()

    def assert_data(self, expression, what):
        try:
            lab.wait_until("", lambda: self.prometheus.query(expression), 15)
        except AssertionError as error:
            if str(error) != "timed out: ":
                raise
            self.fail(f"{what}: no data for {expression}")

    def test_every_panel_has_data(self):
        queries = 0
        for panel in dashboard()["panels"]:
            for target in panel.get("targets", []):
                queries += 1
                with self.subTest(panel["title"]):
                    self.assert_data(expand(target["expr"]), panel["title"])
        self.assertGreater(queries, 40)

    def test_every_query_of_the_documentation_has_data(self):
        text = (lab.ROOT / "docs/metrics.md").read_text()
        queries = re.findall(r"```promql\n(.*?)\n```", text, re.DOTALL)
        self.assertGreater(len(queries), 15)
        for query in queries:
            with self.subTest(query):
                self.assert_data(query, "docs/metrics.md")

    def test_every_rule_is_evaluated_without_an_error(self):
        def rules():
            return [rule for group in self.prometheus.get("rules")["groups"] for rule in group["rules"]]

        lab.wait_until("evaluations", lambda: all(rule["health"] != "unknown" for rule in rules()))
        self.assertGreater(len(rules()), 25)
        self.assertEqual([rule for rule in rules() if rule["health"] != "ok" or rule.get("lastError")], [])

    def test_a_quota_that_two_nodes_share_counts_once(self):
        owner = 'environment="production",scope="environment",kind="total_tokens",per="day"'
        self.assert_data(f"count(tollgate_quota_limit{{{owner}}}) == 2", "the quota on both nodes")
        self.assert_data(f"count(quota:tollgate_quota_limit:max{{{owner}}}) == 1", "the rule")
        self.assert_data(f"quota:tollgate_quota_limit:max{{{owner}}} == 1e6", "the limit")
        self.assert_data("min(tollgate_nodes) == 2", "the nodes")

    def test_tokens_of_all_nodes_add_up_to_the_quota(self):
        def amounts():
            [counted] = self.prometheus.query('sum(tollgate_tokens_total{environment="production"})')
            used = 'quota:tollgate_quota_used:max{environment="production",scope="environment",kind="total_tokens"}'
            [used] = self.prometheus.query(used)
            return float(counted["value"][1]), float(used["value"][1])

        self.stop_traffic()
        lab.wait_until("counters and quota to agree", lambda: amounts()[0] == amounts()[1] > 0)


if __name__ == "__main__":
    unittest.main()
