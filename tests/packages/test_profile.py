"""The profile by which the compiler optimises a release build."""

import pathlib
import subprocess
import unittest

PACKAGING = pathlib.Path(__file__).parents[2] / "packaging"
RELEASE = ["-C", "lto=off", "--out-dir", "/target/release/deps"]


def passed_on(*arguments):
    """The arguments that the compiler gets. It is `echo` here."""
    output = subprocess.run([PACKAGING / "rustc", "echo", *arguments], capture_output=True, text=True, check=True)
    return output.stdout.split()


class Profile(unittest.TestCase):
    def test_release_builds_use_the_profile_and_others_do_not(self):
        use = f"profile-use={PACKAGING}/requests.profdata"
        for crate in ["tollgate", "serde"]:
            arguments = passed_on("--crate-name", crate, *RELEASE)
            self.assertIn(use, arguments)
            self.assertEqual("llvm-args=-inline-threshold=75" in arguments, crate == "tollgate")
        for other in [
            ["-C", "lto=off", "--out-dir", "/target/quick/deps"],
            ["-C", "lto=thin", "--out-dir", "/target/release/deps"],
            ["-vV"],
        ]:
            self.assertEqual(passed_on("--crate-name", "tollgate", *other), ["--crate-name", "tollgate", *other])

    def test_the_profile_is_of_the_compiler_it_names(self):
        content = (PACKAGING / "requests.profdata").read_bytes()
        self.assertEqual(content[:8], b"\xfflprofi\x81")
        self.assertIn("LLVM version", (PACKAGING / "requests.compiler").read_text(encoding="utf-8"))
        self.assertLess(len(content), 3_000_000)


if __name__ == "__main__":
    unittest.main(verbosity=2)
