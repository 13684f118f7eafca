"""A machine that systemd has booted: systemd as process 1 of own namespaces, with the files of the Debian package.

Its file system is that of this machine below an overlay: what systemd and the services write goes to memory, and ends with
the machine. It has its own network, so that the addresses of the package's config are free.
"""

import os
import pathlib
import signal
import subprocess
import time

# Nothing of this machine can be written: the root is an overlay, and no other file system is mounted below it. Without the
# `.wants` folders no unit of this machine starts; its systemd-tmpfiles would otherwise clean folders.
BOOT = r"""
set -e
mount --make-rprivate /
cd "$1"
mkdir memory
mount -t tmpfs -o mode=755 tmpfs memory
cd memory
mkdir upper work root
cp -a ../files/. upper
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do touch "dev/$device" && mount --bind "/dev/$device" "dev/$device"; done
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for folder in tmp run var/tmp var/log root home; do mount -t tmpfs -o mode=755 tmpfs "$folder"; done
chmod 1777 tmp
mount -t cgroup2 cgroup2 sys/fs/cgroup
ip link set lo up
mkdir run/old
pivot_root . run/old
umount -l /run/old
rm -rf /etc/systemd/system/*.wants /usr/lib/systemd/system/*.wants /lib/systemd/system/*.wants
for target in empty sysinit basic network network-online; do
  printf '[Unit]\nDefaultDependencies=no\n' > "/etc/systemd/system/$target.target"
done
cd /
container=tollgate-test exec /lib/systemd/systemd --system --unit=empty.target --log-target=console --show-status=no
"""

CONTAIN = r"""
set -e
group=$(findmnt -n -t cgroup2 -o TARGET | head -n 1)/$2
mkdir "$group"
echo $$ > "$group/cgroup.procs"
exec unshare --mount --pid --cgroup --net --ipc --uts --fork --kill-child --mount-proc bash -c "$3" bash "$1"
"""


class Machine:
    """Use it with `with`. `files`: the folder that the package was extracted to."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.group = f"tollgate-test-{os.getpid()}"
        self.log = folder / "systemd.log"

    def __enter__(self):
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                # The machine ends with the test, however that ends.
                ["setpriv", "--pdeathsig", "KILL", "bash", "-c", CONTAIN, "bash", str(self.folder), self.group, BOOT],
                stdout=log,
                stderr=log,
            )
        for _ in range(200):
            if self.process.poll() is not None:
                break
            self.init = self._child()
            if self.init and self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"):
                return self
            time.sleep(0.05)
        log = self.log.read_text()
        self.__exit__()
        raise RuntimeError(f"systemd does not start in namespaces of this machine: {log}")

    def _child(self):
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        is_systemd = lambda pid: pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == "systemd"
        return next((pid for pid in children if is_systemd(pid)), None)

    def __exit__(self, *_):
        # The end of process 1 ends all others of its namespace.
        if self.process.poll() is None:
            init = getattr(self, "init", None)
            os.kill(int(init) if init else self.process.pid, signal.SIGKILL)
            self.process.wait()
        mounted = subprocess.run(["findmnt", "-n", "-t", "cgroup2", "-o", "TARGET"], capture_output=True, text=True).stdout
        for group in (pathlib.Path(root) / self.group for root in mounted.split()):
            # The last processes may still be ending.
            for _ in range(100):
                subprocess.run(["find", group, "-depth", "-type", "d", "-delete"], capture_output=True)
                if not group.exists():
                    break
                time.sleep(0.05)

    def run(self, *command, **options):
        """Runs a command on the machine."""
        inside = ["nsenter", "-t", self.init, "-m", "-p", "-n", *command]
        return subprocess.run(inside, capture_output=True, text=True, timeout=30, **options)

    def must(self, *command):
        """Runs a command that must succeed, and returns its output."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.log.read_text()}\n{self.journal()}"
        return done.stdout

    def journal(self):
        """What the gateway has written to its log."""
        return self.run("cat", "/run/tollgate.log").stdout

    def write(self, path, text):
        self.must("mkdir", "-p", str(pathlib.Path(path).parent))
        done = self.run("tee", path, input=text)
        assert done.returncode == 0, done.stderr

    def show(self, *properties):
        """Properties of the service, as systemd has them."""
        lines = self.must("systemctl", "show", "tollgate", "-p", ",".join(properties)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def wait_until(self, holds, what):
        for _ in range(300):
            if holds():
                return
            time.sleep(0.05)
        raise AssertionError(f"not within 15 s: {what}\n{self.log.read_text()}\n{self.journal()}")
