"""A real Slurm for tests: munge, slurmctld and two slurmd on this machine, as root, without systemd, cgroups or accounting.

Everything (keys, sockets, spool, logs) lies in one folder, on ports of its own, so several can run side by side. GPUs are character devices
that nothing computes on; they test that jobs ask for them rightly.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    if os.geteuid() != 0:
        return "slurmd starts jobs as root only"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"{', '.join(absent)} not installed: apt-get install --no-install-recommends slurm-wlm munge" if absent else None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Slurm:
    """A cluster of nodes n1, n2, ... in `folder`. `environment` is what a client needs in its environment."""

    def __init__(self, folder: Path, *, nodes: int = 2, cpus: int = 8, gpus: int = 4, node_timeout: int = 30) -> None:
        """node_timeout: seconds without a word from a slurmd after which its node is down (SlurmdTimeout)."""
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "log", "munge"):
            (folder / name).mkdir(parents=True, mode=0o755)
        for i in range(gpus):
            # 1, 3: /dev/null. slurmd wants a character device and opens none.
            subprocess.run(["mknod", str(folder / f"gpu{i}"), "c", "1", "3"], check=True)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
        control, *ports = _free_ports(1 + nodes)
        host = socket.gethostname()
        (folder / "slurm.conf").write_text(
            "ClusterName=test\n"
            f"SlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={control}\n"
            "SlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={folder}/munge/socket,cred_expire=5\n"
            f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool-%n\nSlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/%n.pid\n"
            f"SlurmctldLogFile={folder}/log/ctld.log\nSlurmdLogFile={folder}/log/%n.log\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n"
            "AccountingStorageType=accounting_storage/none\nMpiDefault=none\nSwitchType=switch/none\n"
            "SchedulerType=sched/backfill\nSelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\n"
            f"ReturnToService=2\nSlurmdParameters=config_overrides\nSlurmdTimeout={node_timeout}\nJobRequeue=1\nGresTypes=gpu\n"
            + "".join(
                f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={p} CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN\n"
                for n, p in zip(self.nodes, ports)
            )
            + f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        )

    def start(self) -> None:
        """All daemons; returns when every node is idle."""
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        self._start(
            "munged", "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        self._until(lambda: (munge / "socket").exists(), "munge's socket")
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        self._until(lambda: set(self.run("sinfo", "-hN", "-o", "%T").split()) == {"idle"}, "idle nodes")

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a machine that loses power: SIGKILL to the node's slurmd, its step daemons and all that they started."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        self.kill_steps(node)

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to slurmd alone; the steps live on."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    def kill_steps(self, node: str) -> None:
        """SIGKILL to what runs for jobs on a node, found by the environment that Slurm gives it."""
        for pid in self.processes(node):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass

    def workers(self) -> list[int]:
        """The ranks that torchrun has started on any node."""
        found = []
        for pid in {p for node in self.nodes for p in self.processes(node)}:
            try:
                names = {w.partition(b"=")[0] for w in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
            except OSError:
                continue
            found += [pid] * ({b"RANK", b"LOCAL_RANK"} <= names)
        return found

    def processes(self, node: str) -> list[int]:
        """Processes of jobs on a node of this cluster, with the step daemons above them."""
        mine, parents, steps = [], {}, set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = dict(w.split(b"=", 1) for w in (entry / "environ").read_bytes().split(b"\0") if b"=" in w)
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                name = (entry / "comm").read_text().strip()
            except (OSError, ValueError):
                continue
            ours = words.get(b"SLURM_CONF", b"").decode() == self.environment["SLURM_CONF"]
            if name == "slurmstepd" and ours:
                steps.add(int(entry.name))
            elif ours and words.get(b"SLURMD_NODENAME", b"").decode() == node:
                mine.append(int(entry.name))
        above = {parents[p] for p in mine if p in parents} & steps
        return [*above, *mine]

    def stop(self) -> None:
        """Ends the jobs, then the daemons: those would leave steps behind."""
        try:
            if "slurmctld" in self._daemons:
                self.run("scancel", "--user=root", check=False)
                self._until(lambda: not self.run("squeue", "-h", check=False).strip(), "the end of all jobs", seconds=10, must=False)
            for node in self.nodes:
                self.kill_steps(node)
        finally:
            for process in reversed(self._daemons.values()):
                process.terminate()
            for process in self._daemons.values():
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            self._daemons.clear()

    def run(self, *words: str, check: bool = True) -> str:
        """A client program; its output. Never waits for ever."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Fields of `scontrol show job`; empty when Slurm has forgotten it."""
        said = self.run("scontrol", "show", "job", "-o", str(number), check=False)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def logs(self) -> str:
        """The ends of all daemons' logs, for the message of a failed test."""
        ends = {p.name: p.read_text(errors="replace").splitlines()[-25:] for p in sorted((self.folder / "log").iterdir())}
        return "\n".join(line for name, lines in ends.items() for line in (f"--- {name}", *lines))

    def _start(self, name: str, *words: str) -> None:
        log = open(self.folder / "log" / f"{name}.out", "ab")
        self._daemons[name] = subprocess.Popen(
            words, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def _until(self, true: object, what: str, seconds: float = 30, must: bool = True) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if true():  # type: ignore[operator]
                    return
            except AssertionError:  # a daemon that is not there yet
                pass
            time.sleep(0.1)
        assert not must, f"no {what} after {seconds} s\n{self.logs()}"
