"""Runs a rendered script with every program replaced by one that writes down how it was called, so that a test can see what a name turned into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# What scripts need that does nothing by itself.
_TOOLS = ("bash", "cat", "grep", "head", "rm", "tr")

# A file for each call: programs run side by side. Named by the time, so that sorting gives the order.
RECORD = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >"$RECORD/$EPOCHREALTIME-$$"
"""

# Stands for python -m torch.distributed.run ...; the run (the words `moetrain train`) is preempted when STATUS names a file.
_PYTHON = (
    RECORD
    + """case " $* " in *" moetrain train "*)
    [ -z "${STATUS:-}" ] || printf '%s\\n' '{"state": "preempted", "steps_done": 3, "x": 0}' >"$STATUS" ;;
esac
printf '%s' "${VALUE-unset}" >"$PLACE/value"
"""
)

# Runs what it is given on a node, as the real ones do.
_SRUN = (
    RECORD
    + """while [ "${1#--}" != "$1" ]; do shift; done
case "$1" in hostname) echo '::1 10.0.0.7 10.0.0.8' ;; *) SLURM_NODEID=0 exec "$@" ;; esac
"""
)
_SSH = (
    RECORD
    + """while [ "$1" != -- ]; do shift 2; done
shift 2
exec "$@"
"""
)
_SCONTROL = (
    RECORD
    + """case "$1" in show) printf 'n1\\nn2\\n' ;; esac
"""
)
_TIMEOUT = """#!/bin/bash
shift
exec "$@"
"""


@dataclass
class Played:
    """calls: every program with its words, in order. code: the script's exit status. value: $VALUE as python saw it."""

    calls: list[list[str]]
    code: int
    said: str
    value: str

    def of(self, program: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == program]


class Stage:
    """A folder with the stand-ins."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.bin = place / "bin"
        self.bin.mkdir(parents=True)
        for name in _TOOLS:
            (self.bin / name).symlink_to(str(shutil.which(name)))
        scripts = {"srun": _SRUN, "ssh": _SSH, "scontrol": _SCONTROL, "timeout": _TIMEOUT, "module": RECORD, "sleep": "#!/bin/bash\n"}
        for name, text in scripts.items():
            self.program(self.bin / name, text)

    def program(self, path: Path, text: str = _PYTHON) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def play(self, words: list[str], **environment: str) -> Played:
        """Run it. A program that is none of the stand-ins is an error of the script's."""
        record = self.place / "record"
        record.mkdir()
        (self.place / "value").unlink(missing_ok=True)
        surroundings = {
            "PATH": str(self.bin), "RECORD": str(record), "PLACE": str(self.place), "SLURM_JOB_ID": "20005", "SLURM_JOB_NODELIST": "n[1-2]",
            # bash calls this function for a command that it does not find.
            "BASH_FUNC_command_not_found_handle%%": '() { printf "%s\\0" UNKNOWN "$@" >"$RECORD/$EPOCHREALTIME-$BASHPID"; }',
            **environment,
        }  # fmt: skip
        done = subprocess.run(words, env=surroundings, cwd=self.place, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        calls = [[w.decode() for w in call.read_bytes().split(b"\0")[:-1]] for call in sorted(record.iterdir())]
        shutil.rmtree(record)
        value = (self.place / "value").read_text() if (self.place / "value").exists() else ""
        return Played(calls, done.returncode, done.stdout + done.stderr, value)


def shellcheck(text: str, path: Path) -> str:
    """What shellcheck has to say about a script."""
    path.write_text(text)
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "shellcheck is one of the dev extras"
    return subprocess.run([program, "--shell=bash", str(path)], capture_output=True, text=True, timeout=60).stdout
