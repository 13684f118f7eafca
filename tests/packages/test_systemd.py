"""The units: rated and verified by systemd-analyze, and run by a real systemd."""

import json
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import unittest

import debian_package
from machine import Machine
from support import BINARY, PACKAGING, run

UNITS = PACKAGING / "systemd"
MAX_EXPOSURE = 2.0


class Units(unittest.TestCase):
    def test_the_exposure_of_the_service_is_low(self):
        report = run("systemd-analyze", "security", "--offline=yes", "--no-pager", "--json=short", UNITS / "tollgate.service")
        exposure = sum(float(line["exposure"] or 0) for line in json.loads(report))
        overall = run("systemd-analyze", "security", "--offline=yes", "--no-pager", UNITS / "tollgate.service")
        rating = float(overall.strip().splitlines()[-1].split("tollgate.service:")[1].split()[0])
        print(f"exposure {rating}, the sum of its lines {exposure:.1f}")
        self.assertLess(rating, MAX_EXPOSURE)

    def test_systemd_finds_no_fault_in_the_units(self):
        with tempfile.TemporaryDirectory() as folder:
            # The program need not be installed here.
            program = pathlib.Path(folder) / "tollgate"
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
            for unit in UNITS.iterdir():
                text = unit.read_text().replace("/usr/bin/tollgate", str(program))
                (pathlib.Path(folder) / unit.name).write_text(text)
            units = sorted(pathlib.Path(folder).glob("*.s*"))
            done = subprocess.run(
                ["systemd-analyze", "verify", "--man=no", *map(str, units)], capture_output=True, text=True
            )
            # Units of this machine may have faults of their own.
            faults = [line for line in (done.stdout + done.stderr).splitlines() if "tollgate" in line]
            self.assertEqual(faults, [])


class PassedSockets(unittest.TestCase):
    """Sockets that the gateway cannot use: it says what to change in the unit."""

    def refusal(self, names, *sockets):
        numbers = [one.fileno() for one in sockets]
        # The descriptors begin at 3. A number that is moved there must not be one that is still needed.
        moves = "; ".join([*(f"exec {20 + i}<&{n}" for i, n in enumerate(numbers)), *(f"exec {3 + i}<&{20 + i}" for i in range(len(numbers)))])
        command = f'{moves}; LISTEN_FDS={len(sockets)} LISTEN_FDNAMES={names} LISTEN_PID=$$ exec "$0" serve'
        done = subprocess.run(
            ["bash", "-c", command, str(BINARY)], pass_fds=numbers, capture_output=True, text=True, timeout=20
        )
        self.assertEqual(done.returncode, 1, done.stderr)
        return done.stderr

    def test_a_refusal_names_the_setting_of_the_unit(self):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            self.assertIn("set FileDescriptorName=callers", self.refusal("tollgate.socket", one))
            self.assertIn("two sockets with the name \"admin\"", self.refusal("admin:admin", one, other))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.bind(("127.0.0.1", 0))
            self.assertIn("set ListenStream=", self.refusal("callers", datagrams))
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            self.assertIn("it does not listen", self.refusal("callers", silent))


class Service(unittest.TestCase):
    """The service under a real systemd, installed from the Debian package."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="tollgate-machine-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        run("dpkg-deb", "-x", debian_package.build(), cls.folder / "files")
        machine = Machine(cls.folder)
        try:
            cls.machine = machine.__enter__()
        except (RuntimeError, OSError) as error:
            raise unittest.SkipTest(f"NOT RUN, the service under a real systemd: {error}")
        cls.addClassCleanup(machine.__exit__)
        # There is no journal. The watchdog of the package would take half a minute.
        cls.machine.write(
            "/run/systemd/system/tollgate.service.d/test.conf",
            "[Service]\nStandardOutput=append:/run/tollgate.log\nStandardError=append:/run/tollgate.log\nWatchdogSec=1500ms\n",
        )
        cls.machine.must("systemctl", "daemon-reload")

    def setUp(self):
        self.machine.run("systemctl", "stop", "tollgate.socket", "tollgate-admin.socket", "tollgate.service")
        self.machine.run("systemctl", "reset-failed")

    def http(self, path, port=9090):
        return self.machine.run("curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}{path}").stdout

    def test_start_reload_upgrade_and_stop(self):
        machine = self.machine
        # `start` returns when the gateway is ready.
        machine.must("systemctl", "start", "tollgate")
        self.assertEqual(self.http("/readyz"), "200")
        first = machine.show("MainPID", "ActiveState", "StatusText", "NRestarts")
        self.assertEqual(first["ActiveState"], "active")
        self.assertIn("serving callers at 127.0.0.1:8080", first["StatusText"])
        machine.must("test", "-s", "/var/lib/private/tollgate/tollgate.db")

        machine.must("systemctl", "reload", "tollgate")
        config = machine.must("cat", "/etc/tollgate/tollgate.yaml")
        machine.write("/etc/tollgate/tollgate.yaml", "environments: 3\n")
        refused = machine.run("systemctl", "reload", "tollgate")
        self.assertNotEqual(refused.returncode, 0)
        self.assertEqual(self.http("/readyz"), "200")
        machine.write("/etc/tollgate/tollgate.yaml", config)
        machine.must("systemctl", "reload", "tollgate")
        self.assertEqual(machine.show("MainPID", "NRestarts"), {"MainPID": first["MainPID"], "NRestarts": "0"})

        machine.must("systemctl", "kill", "--kill-who=main", "--signal=USR2", "tollgate")
        replaced = lambda: machine.show("MainPID")["MainPID"] not in ("0", first["MainPID"])
        machine.wait_until(replaced, "a new main process")
        ended = lambda: machine.run("test", "-e", f"/proc/{first['MainPID']}").returncode != 0
        machine.wait_until(ended, "the end of the old process")
        second = machine.show("MainPID", "ActiveState", "NRestarts")
        self.assertEqual((second["ActiveState"], second["NRestarts"]), ("active", "0"))
        self.assertEqual(self.http("/readyz"), "200")

        machine.must("systemctl", "stop", "tollgate")
        self.assertEqual(machine.show("ActiveState", "Result"), {"ActiveState": "inactive", "Result": "success"})
        self.assertIn('"stopped"', machine.journal())

    def test_the_watchdog_restarts_a_gateway_that_hangs(self):
        machine = self.machine
        machine.must("systemctl", "start", "tollgate")
        first = machine.show("MainPID")["MainPID"]
        machine.must("kill", "-STOP", first)
        restarted = lambda: machine.show("NRestarts", "ActiveState") == {"NRestarts": "1", "ActiveState": "active"}
        machine.wait_until(restarted, "a restart by the watchdog")
        self.assertEqual(self.http("/readyz"), "200")

    def test_sockets_of_systemd_start_the_service_and_survive_its_restart(self):
        machine = self.machine
        machine.must("systemctl", "start", "tollgate.socket", "tollgate-admin.socket")
        self.assertEqual(machine.show("ActiveState")["ActiveState"], "inactive")
        # The first connection starts the gateway. A path that is not served has no upstream.
        self.assertEqual(self.http("/nothing", 8080), "404")
        self.assertEqual(self.http("/readyz"), "200")
        self.assertNotIn("another address", machine.journal())
        codes, stop = [], threading.Event()

        def call():
            while not stop.is_set():
                codes.append(self.http("/nothing", 8080))

        caller = threading.Thread(target=call)
        caller.start()
        machine.must("systemctl", "restart", "tollgate")
        stop.set()
        caller.join()
        # A request of an open connection is refused while the gateway shuts down; no connection is.
        self.assertTrue(codes and set(codes) <= {"404", "503"}, codes)


if __name__ == "__main__":
    unittest.main(verbosity=2)
