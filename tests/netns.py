"""Two hosts as network namespaces of this machine, joined by one link that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

INTERFACE = "link0"


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


def missing() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "ip or unshare is not installed: apt-get install --no-install-recommends iproute2"
    name = f"moetrain-try-{os.getpid()}"
    made = _ip("netns", "add", name)
    link = _ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", "name", "link1", "netns", name)
    _ip("netns", "del", name)
    return next((f"no network namespaces here: {done.stderr.strip()}" for done in (made, link) if done.returncode), None)


class Hosts:
    """Hosts n0 and n1, which know each other by name; a context manager."""

    addresses = ("10.213.77.1", "10.213.77.2")

    def __init__(self) -> None:
        self.spaces = [f"moetrain-{os.getpid()}-{i}" for i in range(2)]

    def __enter__(self) -> Hosts:
        for space in self.spaces:
            # `ip netns exec` puts these files in the place of /etc's.
            folder = Path("/etc/netns") / space
            folder.mkdir(parents=True)
            names = "".join(f"{address} n{i}\n" for i, address in enumerate(self.addresses))
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            self._must("netns", "add", space)
        first, second = self.spaces
        self._must("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for space, address in zip(self.spaces, self.addresses):
            self._must("-n", space, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                self._must("-n", space, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces:
            for pid in _ip("netns", "pids", space).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", space)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)

    def cut(self) -> None:
        """From now on every packet is lost; no connection is told."""
        self._must("-n", self.spaces[0], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        self._must("-n", self.spaces[0], "link", "set", INTERFACE, "up")

    def ssh(self) -> str:
        """Text of a shell program in ssh's place: `ssh [-o X]... -- n1 COMMAND...`, by the number in the host's name."""
        enter = f'exec ip netns exec "moetrain-{os.getpid()}-${{host#n}}" unshare --uts bash -c \'hostname "$0"; exec "$@"\' "$host" "$@"'
        return f'while [ "$1" != -- ]; do shift 2; done\nhost=$2\nshift 2\n{enter}'

    @staticmethod
    def _must(*words: str) -> None:
        done = _ip(*words)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
