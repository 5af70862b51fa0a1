"""One training run as every renderer needs it, and the parts that their scripts share."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from moetrain.cluster.options import ClusterConfig
from moetrain.config import ConfigError

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# As moetrain.preempt writes it to status.json, for grep.
PREEMPTED = '"state": "preempted"'
OVER = r'"state": "(finished|preempted)"|"retry": false|"state": "failed", "step": [0-9]+, "steps_done"'
"""Another start would be of no use: done, asked to stop, or failed of itself (a lost peer leaves `"retry": true` in the place of steps_done)."""
HOPELESS = '"retry": false'
ENDED = '"state": "(finished|preempted|failed)"'

LINT = "# shellcheck disable=SC2016,SC1003,SC2088  # what a user wrote stands between single quotes for itself, dollar, tilde and all"


@dataclass(frozen=True)
class Job:
    """name: a DNS label. workdir: where relative paths of the config start. run_dir: as the config has it. folder: absolute, for scripts and
    logs, seen by all nodes under this name (not used for Kubernetes). config: the resolved config, YAML. python: the interpreter.

    Raises ConfigError for a path that no script can hold.
    """

    name: str
    workdir: str
    run_dir: str
    folder: str
    config: str
    python: str

    def __post_init__(self) -> None:
        for name in ("workdir", "run_dir", "folder", "python"):
            value = getattr(self, name)
            if not value.isprintable():
                raise ConfigError(f"{name} {value!r}: holds a line break or another character that can't be printed; choose another path")

    @property
    def config_file(self) -> str:
        return f"{self.folder}/config.yaml"

    @property
    def status_file(self) -> str:
        return f"{self.run_dir}/status.json"


def job_name(run_dir: str) -> str:
    """The last part of a path as a DNS label of 40 characters at most, which Slurm takes as well."""
    last = re.sub(r"[^a-z0-9]+", "-", run_dir.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    return last if last[:1].isalpha() else f"run-{last}"[:40].strip("-")


def quote(word: str) -> str:
    """One word of shell. As shlex.quote, and with a word quoted that has `=`, which in an array would name an element, or `,`, which there looks
    like a mistake to shellcheck."""
    return "'" + word.replace("'", "'\"'\"'") + "'" if set(word) & {"=", ","} else shlex.quote(word)


def quoted(words: list[str]) -> str:
    """Words as one line of shell."""
    return " ".join(quote(word) for word in words)


def train_words(config_file: str) -> list[str]:
    """Behind torchrun's own options: the run."""
    return ["-m", "moetrain", "train", "--config", config_file]


def preflight_words(config_file: str) -> list[str]:
    """Behind torchrun's own options: the look at all ranks before it."""
    return ["-m", "moetrain", "doctor", "--ranks", "--config", config_file]


def surroundings(cluster: ClusterConfig, workdir: str) -> list[str]:
    """Lines of shell that each node runs first: folder, environment, secrets that must be there, the user's own file."""
    lines = [
        f"cd -- {quote(workdir)} || exit",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"',
        "# Time that torchrun gives the ranks to save after SIGTERM.",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={cluster.grace_seconds}",
        "# A store of its own for each start of the ranks: in a shared one they find each other's addresses of the start before.",
        f"export {FRESH_STORE}=1",
        *(f"export {name}={quote(value)}" for name, value in cluster.environment.items()),
    ]
    if cluster.setup_script is not None:
        path = cluster.setup_script
        # `.` looks a bare name up in PATH.
        path = path if "/" in path else f"./{path}"
        lines += ["# shellcheck source=/dev/null", f". {quote(path)} || exit"]
    lines += [f': "${{{name}:?named in cluster.secrets, but not set}}"' for name in cluster.secrets]
    return lines
