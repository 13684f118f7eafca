"""The order of the program's functions, by which `packaging/functions.ld` puts those of requests side by side."""

import re
import unittest

from support import BINARY, run

# The functions of a small chat alone have this many bytes.
MIN_BYTES = 200_000


class Functions(unittest.TestCase):
    def test_the_functions_of_requests_are_side_by_side(self):
        sections = run("readelf", "-SW", BINARY)
        found = re.search(r"\.text\.requests +PROGBITS +\S+ +\S+ +(\S+)", sections)
        self.assertIsNotNone(found, "the linker has not used packaging/functions.ld")
        # Names that no function has any more leave the section empty: run packaging/functions.
        self.assertGreater(int(found.group(1), 16), MIN_BYTES)


if __name__ == "__main__":
    unittest.main(verbosity=2)
