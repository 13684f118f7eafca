"""Fixed ports for servers that tests stop and restart."""

import random
import socket


def free_port():
    """A port outside the ephemeral range, so that no connection gets it while its server is stopped."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
