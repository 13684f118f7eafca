"""The requests for which `packaging/release` optimises the program."""

import os
import pathlib
import signal
import subprocess
import sys
import unittest

TRAINING = pathlib.Path(__file__).parents[2] / "packaging/training.py"


class Training(unittest.TestCase):
    def test_every_request_gets_the_expected_answer(self):
        # A session of its own, so that none of its processes stays behind.
        training = subprocess.Popen(
            [sys.executable, TRAINING, os.environ["TOLLGATE_BIN"], "120"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = training.communicate(timeout=120)
        finally:
            if training.poll() is None:
                os.killpg(training.pid, signal.SIGKILL)
                training.wait()
        self.assertEqual(training.returncode, 0, output)


if __name__ == "__main__":
    unittest.main(verbosity=2)
