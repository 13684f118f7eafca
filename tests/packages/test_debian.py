"""The Debian package, built from a binary that exists already, and installed below a folder."""

import pathlib
import shutil
import subprocess
import tempfile
import unittest

import debian_package
from support import BINARY, ROOT, run


class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="tollgate-deb-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.package = debian_package.build()

    def test_it_holds_what_an_administrator_expects(self):
        files = {line.split(maxsplit=5)[5].removeprefix("./") for line in run("dpkg-deb", "-c", self.package).splitlines()}
        for path in (
            "usr/bin/tollgate",
            "etc/tollgate/tollgate.yaml",
            "usr/lib/systemd/system/tollgate.service",
            "usr/lib/systemd/system/tollgate.socket",
            "usr/lib/systemd/system/tollgate-admin.socket",
            "usr/share/man/man1/tollgate.1.gz",
            "usr/share/man/man1/tollgate-serve.1.gz",
            "usr/share/bash-completion/completions/tollgate",
            "usr/share/zsh/vendor-completions/_tollgate",
            "usr/share/fish/vendor_completions.d/tollgate.fish",
            "usr/share/doc/tollgate/copyright",
            "usr/share/doc/tollgate/docs/operations.md",
        ):
            self.assertIn(path, files)
        control = run("dpkg-deb", "-f", self.package)
        self.assertIn("Package: tollgate\n", control)
        self.assertEqual(run("dpkg-deb", "-I", self.package, "conffiles"), "/etc/tollgate/tollgate.yaml\n")
        for script in ("postinst", "prerm", "postrm"):
            text = run("dpkg-deb", "-I", self.package, script)
            subprocess.run(["sh", "-n"], input=text, text=True, check=True)

    def test_it_can_be_installed_upgraded_and_purged(self):
        root = self.folder / "root"
        for folder in ("var/lib/dpkg/info", "var/lib/dpkg/updates", "usr/bin", "etc"):
            (root / folder).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        # The maintainer scripts run without a chroot: there is no shell below the folder.
        dpkg = ["dpkg", "--root", root, "--force-not-root", "--force-depends", "--force-script-chrootless"]
        installed = run(*dpkg, "-i", self.package)
        self.assertIn("systemctl enable --now tollgate", installed)
        config = root / "etc/tollgate/tollgate.yaml"
        self.assertIn("The config is valid", run(root / "usr/bin/tollgate", "check", "--config", config))
        # A config that the administrator has changed stays.
        changed = config.read_text() + "# changed\n"
        config.write_text(changed)
        run(*dpkg, "-i", self.package)
        self.assertEqual(config.read_text(), changed)
        run(*dpkg, "--remove", "tollgate")
        self.assertTrue(config.exists() and not (root / "usr/bin/tollgate").exists())
        store = root / "var/lib/tollgate/tollgate.db"
        store.parent.mkdir(parents=True)
        store.touch()
        run(*dpkg, "--purge", "tollgate")
        self.assertFalse(config.exists() or store.parent.exists())

    def test_the_config_of_the_packages_is_valid(self):
        self.assertIn("The config is valid", run(BINARY, "check", "--config", ROOT / "packaging/tollgate.yaml"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
