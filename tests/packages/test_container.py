"""The Dockerfile: linted, its stages checked against each other, and its last stage built if a builder is here."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

from support import BINARY, PACKAGING, ROOT, run, tool

DOCKERFILE = PACKAGING / "container/Dockerfile"


class Image(unittest.TestCase):
    def test_hadolint_finds_no_fault(self):
        run(tool("hadolint"), "--failure-threshold", "style", DOCKERFILE)

    def test_the_build_stage_gets_all_sources(self):
        # What the ignore file lets through: `*` excludes all, `!` includes.
        lines = DOCKERFILE.with_suffix(".dockerignore").read_text().splitlines()
        included = {line[1:] for line in lines if line.startswith("!")}
        tracked = {path.split("/")[0] for path in run("git", "ls-files", cwd=ROOT).splitlines()}
        members = re.search(r"^members = \[(.*)\]", (ROOT / "Cargo.toml").read_text(), re.M).group(1)
        needed = ["Cargo.toml", "Cargo.lock", "src", "packaging", "config", "benches", "tests", *re.findall(r'"(.*?)"', members)]
        self.assertEqual([name for name in needed if name not in included], [])
        self.assertTrue({name for name in included if "*" not in name} <= tracked | {"LICENSE-*"}, included - tracked)

    def test_the_image_holds_the_program_the_config_and_the_licences(self):
        with tempfile.TemporaryDirectory() as folder:
            image = pathlib.Path(folder) / "image"
            run(PACKAGING / "container/layout", BINARY, image)
            text = DOCKERFILE.read_text()
            for source in re.findall(r"^COPY --from=build .*?(/image\S+) ", text, re.M):
                self.assertTrue((image / pathlib.Path(source).relative_to("/image")).exists(), source)
            settings = dict(re.findall(r"\b(TOLLGATE\w+)=(\S+)", text.split("ENV ")[1]))
            self.assertTrue((image / settings["TOLLGATE_CONFIG"].lstrip("/")).exists())
            environment = os.environ | settings | {"TOLLGATE_CONFIG": str(image / "etc/tollgate/tollgate.yaml")}
            refused = subprocess.run([BINARY, "check"], env=environment, capture_output=True, text=True)
            self.assertIn("admin.token", refused.stderr)
            report = run(BINARY, "check", env=environment | {"TOLLGATE_ADMIN_TOKEN": "t" * 32})
            self.assertIn("0.0.0.0:8080", report)

    def test_a_builder_builds_the_last_stage(self):
        if not shutil.which("buildah"):
            self.skipTest("NOT RUN, the build of the image: buildah is not installed here, and there is no Docker engine")
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            run(PACKAGING / "container/layout", BINARY, folder / "stage/image")
            buildah = ["buildah", "--storage-driver", "vfs", "--root", folder / "root", "--runroot", folder / "run"]
            # The stage "build" is replaced by a folder with the same files. The base cannot be fetched here.
            run(*buildah, "build", "--isolation", "chroot", "--format", "docker", "--build-arg", "BASE=scratch",
                "--build-context", f"build={folder / 'stage'}", "-f", DOCKERFILE, "-t", "tollgate", folder / "stage")
            config = run(*buildah, "inspect", "--type", "image", "tollgate")
            config = json.loads(config)["Docker"]["config"]
            self.assertEqual(config["User"], "65532:65532")
            self.assertEqual(config["Entrypoint"] + config["Cmd"], ["/usr/bin/tollgate", "serve"])
            self.assertIn("/var/lib/tollgate", config["Volumes"])
            self.assertEqual(config["Healthcheck"]["Test"], ["CMD", "/usr/bin/tollgate", "health"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
