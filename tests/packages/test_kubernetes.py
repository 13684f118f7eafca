"""The manifests: rendered by kubectl, valid by the schemas of Kubernetes, and consistent with each other and the gateway."""

import os
import pathlib
import subprocess
import tempfile
import unittest

import yaml
from support import BINARY, PACKAGING, run, tool

FOLDER = PACKAGING / "kubernetes"
# There is no schema here for the types of the Prometheus operator.
WITHOUT_SCHEMA = {"ServiceMonitor"}
DRAIN_TIMEOUT_S = 30
SECRETS = {"TOLLGATE_ADMIN_TOKEN": "t" * 32, "OPENAI_API_KEY": "k", "REDIS_PASSWORD": "p"}


def rendered(name):
    return list(yaml.safe_load_all(run(tool("kubectl"), "kustomize", FOLDER / name)))


class Manifests(unittest.TestCase):
    def setUp(self):
        self.sets = {name: rendered(name) for name in ("base", "overlays/redis")}

    def of_kind(self, name, kind):
        return [resource for resource in self.sets[name] if resource["kind"] == kind]

    def gateway(self, name):
        return next(one for one in self.of_kind(name, "StatefulSet") if one["metadata"]["name"] == "tollgate")

    def test_the_schemas_of_kubernetes_accept_them(self):
        for name, resources in self.sets.items():
            known = [resource for resource in resources if resource["kind"] not in WITHOUT_SCHEMA]
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                yaml.safe_dump_all(known, file)
                file.flush()
                report = subprocess.run(
                    [tool("kubernetes-validate"), "--strict", file.name], capture_output=True, text=True
                )
                self.assertEqual(report.returncode, 0, report.stdout + report.stderr)
                passed = (report.stdout + report.stderr).count(" passed ")
                self.assertEqual(passed, len(known), report.stdout + report.stderr)
            print(f"{name}: {len(known)} of {len(resources)} resources are valid; no schema here for {sorted(WITHOUT_SCHEMA)}")

    def test_every_file_belongs_to_a_kustomization(self):
        listed = set()
        for file in FOLDER.rglob("kustomization.yaml"):
            text = file.read_text()
            listed |= {path for path in file.parent.glob("*.yaml") if path.name in text or path == file}
        self.assertEqual(listed, set(FOLDER.rglob("*.yaml")))

    def test_the_gateway_accepts_the_configs(self):
        for name in self.sets:
            config = next(one for one in self.of_kind(name, "ConfigMap"))["data"]["tollgate.yaml"]
            container = self.gateway(name)["spec"]["template"]["spec"]["containers"][0]
            variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "tollgate.yaml"
                path.write_text(config)
                environment = os.environ | variables | SECRETS | {"TOLLGATE_CONFIG": str(path)}
                report = run(BINARY, "check", env=environment)
                self.assertIn("0.0.0.0:9090", report)
                # Without a token the gateway refuses to listen for administrators at all addresses.
                environment["TOLLGATE_ADMIN_TOKEN"] = ""
                refused = subprocess.run([BINARY, "check"], env=environment, capture_output=True, text=True)
                self.assertEqual(refused.returncode, 2)
                self.assertIn("admin.token", refused.stderr)

    def test_names_of_ports_secrets_and_labels_fit_together(self):
        for name, resources in self.sets.items():
            pods = [one["spec"]["template"] for one in self.of_kind(name, "StatefulSet")]
            secrets = {
                (one["metadata"]["name"], key) for one in self.of_kind(name, "Secret") for key in one["stringData"]
            }
            selects = lambda labels, pod: labels.items() <= pod["metadata"]["labels"].items()
            for service in self.of_kind(name, "Service"):
                chosen = [pod for pod in pods if selects(service["spec"]["selector"], pod)]
                self.assertEqual(len(chosen), 1, service)
                ports = {port["name"] for port in chosen[0]["spec"]["containers"][0]["ports"]}
                self.assertTrue({port["targetPort"] for port in service["spec"]["ports"]} <= ports, service)
            policies = [one["spec"]["podSelector"]["matchLabels"] for one in self.of_kind(name, "NetworkPolicy")]
            budgets = [one["spec"]["selector"]["matchLabels"] for one in self.of_kind(name, "PodDisruptionBudget")]
            for labels in policies + budgets:
                self.assertEqual(sum(selects(labels, pod) for pod in pods), 1, labels)
            for pod in pods:
                for variable in pod["spec"]["containers"][0].get("env", []):
                    if "valueFrom" in variable:
                        key = variable["valueFrom"]["secretKeyRef"]
                        self.assertIn((key["name"], key["key"]), secrets)
            for monitor in self.of_kind(name, "ServiceMonitor"):
                wanted = monitor["spec"]["selector"]["matchLabels"].items()
                chosen = [one for one in self.of_kind(name, "Service") if wanted <= one["metadata"].get("labels", {}).items()]
                ports = [port["name"] for one in chosen for port in one["spec"]["ports"]]
                for endpoint in monitor["spec"]["endpoints"]:
                    self.assertIn(endpoint["port"], ports)
                    key = endpoint["authorization"]["credentials"]
                    self.assertIn((key["name"], key["key"]), secrets)

    def test_the_gateway_has_time_to_drain_and_few_rights(self):
        for name in self.sets:
            pod = self.gateway(name)["spec"]["template"]["spec"]
            container = pod["containers"][0]
            delay = next(one["value"] for one in container["env"] if one["name"].endswith("DRAIN_DELAY"))
            self.assertGreater(pod["terminationGracePeriodSeconds"], int(delay.removesuffix("s")) + DRAIN_TIMEOUT_S + 10)
            self.assertTrue(pod["securityContext"]["runAsNonRoot"])
            self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"])
            self.assertEqual(container["securityContext"]["capabilities"], {"drop": ["ALL"]})
            for mount in container["volumeMounts"]:
                self.assertNotIn("subPath", mount)
        self.assertEqual(self.gateway("overlays/redis")["spec"]["replicas"], 2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
