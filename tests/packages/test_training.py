"""The requests for which `packaging/release` optimises the program."""

import os
import pathlib
import subprocess
import sys
import unittest

TRAINING = pathlib.Path(__file__).parents[2] / "packaging/training.py"


class Training(unittest.TestCase):
    def test_every_request_gets_the_expected_answer(self):
        done = subprocess.run(
            [sys.executable, TRAINING, os.environ["TOLLGATE_BIN"], "120"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        self.assertEqual(done.returncode, 0, done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
