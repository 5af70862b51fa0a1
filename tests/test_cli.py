"""The program as people start it: every command in a real process, one after the other from text to an exported mixture, with each launcher,
and what --help, config and a wrong name say."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain import __version__
from moetrain.bench.main import parser as bench_parser
from moetrain.checkpoint import find_damage
from moetrain.cli import COMMANDS, main
from moetrain.config import load_config, parse_yaml, to_yaml
from moetrain.convert.huggingface import read_config

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMON = "data: {seq_len: 32, train: [{name: text, path: data/text_train}], eval: [{name: text, path: data/text_valid}]}\n"
MODEL = (
    "model: {vocab_size: 259, hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 32, max_position_embeddings: 64}\n"
)


def start(place: Path, *words: str, launcher: list[str] = PYTHON, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], cwd=place, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def moetrain(place: Path, *words: str) -> str:
    done = start(place, "-m", "moetrain", *words)
    assert "Traceback" not in done.stderr
    return done.stdout


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands have gone from text to an exported mixture."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text").mkdir()
    for i in range(30):
        (place / "text" / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (3 + i % 5))
    (place / "dense.yaml").write_text(
        "run_dir: runs/dense\n"
        + MODEL
        + COMMON
        + "train: {steps: 6, global_batch_size: 8, micro_batch_size: 4, lr: 3e-3, eval_every: 3}\nlog: {every: 2}\n"
    )
    (place / "moe.yaml").write_text(
        "run_dir: runs/moe\ninit_from: upcycled\nmodel: {moe: {router: {target_active: 2.5, ste: sampled}}}\n" + COMMON
        + "train: {steps: 4, global_batch_size: 8, micro_batch_size: 4, lr: 1e-3, eval_every: 2}\n"
        + f"log: {{every: 1, tensorboard: {str(has('tensorboard')).lower()}, wandb: {str(has('wandb')).lower()}, "
        + "wandb_mode: offline, wandb_name: tiny}\n"
    )  # fmt: skip

    said = moetrain(place, "prepare", "--prepare.inputs", "[text]", "--prepare.output", "data/text", "--prepare.validation_fraction", "0.2")
    assert "train: " in said and "valid: " in said and "documents" in said
    assert sum(json.loads((place / f"data/text_{split}.json").read_text())["documents"] for split in ("train", "valid")) == 30

    said = moetrain(place, "train", "--config", "dense.yaml")
    assert "step 2/6 | loss" in said and "eval text: loss" in said and "random weights" in said
    assert steps(place / "runs/dense") == [1, 2, 3, 4, 5, 6]

    assert "runs/dense/checkpoints/step-00000006 -> dense (llama)" in moetrain(place, "export", "--run_dir", "runs/dense", "--export.output", "dense")

    method = ["--upcycle.num_experts", "4", "--upcycle.method", "dsmoe"]
    said = moetrain(place, "upcycle", "--upcycle.dense", "dense", "--upcycle.output", "upcycled", *method)
    assert "upcycled (moetrain)" in said and "4 of 4 experts" in said and "(100.0%)" in said

    said = moetrain(place, "train", "--config", "moe.yaml")
    assert "4 experts per layer" in said and "upcycled" in said and "active" in said

    said = moetrain(place, "eval", "--run_dir", "runs/moe", "--eval.output", "figures/moe.json")
    assert "perplexity" in said and "experts per token by layer" in said

    moetrain(place, "export", "--run_dir", "runs/moe", "--export.output", "exported")
    return place


def test_runs_know_their_config(place: Path) -> None:
    """The resolved config of a run reads back, with the model of its start weights written out."""
    config = load_config(place / "runs/moe/config.yaml")
    assert config.init_from == "upcycled" and config.model.moe.num_experts == 4 and config.model.hidden_size == 16
    assert config.model.moe.router.target_active == 2.5 and config.model.moe.router.ste == "sampled"
    assert to_yaml(config) == (place / "runs/moe/config.yaml").read_text()


def test_eval_of_the_export_is_eval_of_the_run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    run = json.loads((place / "figures/moe.json").read_text())
    (place / "eval.yaml").write_text("init_from: exported\n" + COMMON)
    assert main(["eval", "--config", "eval.yaml", "--eval.output", "figures/exported.json", "--eval.batch_size", "8"]) == 0
    exported = json.loads((place / "figures/exported.json").read_text())
    assert run["model"].endswith("step-00000004") and exported["model"] == "exported" and run["num_experts"] == exported["num_experts"] == 4
    a, b = run["sets"]["text"], exported["sets"]["text"]
    assert a.pop("load_by_layer") == b.pop("load_by_layer")
    assert a.pop("active_by_layer") == pytest.approx(b.pop("active_by_layer"), rel=1e-6) and a == pytest.approx(b, rel=1e-6)
    assert 1 < a["perplexity"] < 259 and 0 < a["active"] <= 4
    assert a["params"] == read_config("exported").num_params() > a["active_params"]
    # The last evaluation of training saw the same sequences with the same weights.
    last = json.loads((place / "runs/moe/metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval"]["text"]["loss"] == pytest.approx(a["loss"], rel=1e-6)


def test_generate(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """From a run, in a process; the same text from its export, which has the tokenizer beside it."""
    words = ["generate", "--generate.prompt", "the quick: ", "--generate.max_new_tokens", "8"]
    said = moetrain(place, *words, "--run_dir", "runs/moe")
    assert said.startswith("the quick: ")
    monkeypatch.chdir(place)
    assert main([*words, "--init_from", "exported", "--run_dir", "none"]) == 0
    assert capfd.readouterr().out == said


def test_sinks(place: Path) -> None:
    """The run of moe.yaml wrote to each sink that is installed; none was lost on the way."""
    events = [json.loads(line) for line in (place / "runs/moe/events.jsonl").read_text().splitlines()]
    assert not [e for e in events if e["event"] == "sink_off"]
    if not has("tensorboard") and not has("wandb"):
        pytest.skip("neither tensorboard nor wandb is installed")
    if has("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(place / "runs/moe/tensorboard"))
        read.Reload()
        losses = [json.loads(line)["loss"] for line in (place / "runs/moe/metrics.jsonl").read_text().splitlines()]
        assert [(e.step, e.value) for e in read.Scalars("loss")] == [(i + 1, pytest.approx(v, rel=1e-6)) for i, v in enumerate(losses)]
        assert "moe/active/layer_01" in read.Tags()["scalars"] and "eval/text/perplexity" in read.Tags()["scalars"]
    if has("wandb"):
        (file,) = (place / "runs/moe/wandb").glob("offline-run-*/run-*.wandb")
        assert file.stat().st_size > 0 and (place / "runs/moe/wandb_id.txt").read_text() in file.name


def test_interrupt(place: Path) -> None:
    """Ctrl-C ends a run with status 130 and one line, and what it has saved is whole."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [
        "-m",
        "moetrain",
        "train",
        "--config",
        "dense.yaml",
        "--run_dir",
        "runs/interrupted",
        "--train.steps",
        "100000",
        "--checkpoint.every",
        "5",
    ]
    # Tests that were started in the background inherit "ignore" for SIGINT; a user's terminal does not.
    run = subprocess.Popen(
        [*PYTHON, *words], cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    folder = place / "runs/interrupted/checkpoints"
    try:
        while not list(folder.glob("step-????????")) and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130 and said.splitlines()[-1] == "moetrain: interrupted" and "Traceback" not in said, said
    assert all(find_damage(path) is None for path in folder.glob("step-????????"))


def test_torchrun_goes_on_with_two_ranks(place: Path) -> None:
    """The run that one process began, with the experts on two; and a wrong layout is one line per rank."""
    words = ["-m", "moetrain", "train", "--config", "moe.yaml", "--parallel.ep", "2", "--log.wandb", "false", "--log.tensorboard", "false"]
    done = start(place, *words, "--train.steps", "6", launcher=TORCHRUN)
    assert steps(place / "runs/moe") == [1, 2, 3, 4, 5, 6]
    assert "2 ranks on cpu" in done.stdout and "ep 2" in done.stdout and done.stdout.count("step 5/6") == 1
    events = [json.loads(line) for line in (place / "runs/moe/events.jsonl").read_text().splitlines()]
    assert {"step": 4, "ranks": 2} in [{k: e[k] for k in ("step", "ranks")} for e in events if e["event"] == "resume"]
    done = start(place, *words, "--parallel.dp_shard", "4", "--train.steps", "8", launcher=TORCHRUN, status=1)
    assert "error: parallel: dp_replicate (1) x dp_shard (4) x ep (2) = 8, but 2 ranks were started; start 8, or set dp_shard: -1" in done.stderr
    assert "moetrain rank 0: error:" in done.stderr or "moetrain rank 1: error:" in done.stderr
    assert steps(place / "runs/moe") == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not has("deepspeed"), reason="the deepspeed launcher is not installed: DS_BUILD_OPS=0 pip install deepspeed")
def test_deepspeed_launcher(place: Path) -> None:
    """It starts the same program, with --local_rank in the way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", port, "--module", "moetrain"]
    done = start(
        place, "train", "--config", "dense.yaml", "--run_dir", "runs/deepspeed", "--train.steps", "2", "--train.eval_every", "1", launcher=launcher
    )
    assert steps(place / "runs/deepspeed") == [1, 2] and "2 ranks on cpu" in done.stdout


# ------------------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Says what it does, gives an example that parses, and lists the options it reads."""
    for flag in ("--help", "-h"):
        assert main([command, flag]) == 0
        said = capfd.readouterr().out
        assert COMMANDS[command][0] in said and f"example: {COMMANDS[command][1]}" in said and f"moetrain {command}" in said
    option = {
        "prepare": "prepare.inputs",
        "upcycle": "upcycle.method",
        "train": "train.schedule.type",
        "eval": "data.eval",
        "generate": "generate.top_p",
    }
    option |= {"export": "export.output", "config": "schema", "doctor": "ranks", "submit": "cluster FILE", "logs": "follow"}
    option |= {"status": "run_dir", "cancel": "run_dir", "bench": "rounds", "report": "report.output"}
    assert f"  --{option[command]}" in said
    if command == "train":
        assert "--train.dtype (default float32; one of float32, bfloat16, float64)" in said and "--train.steps (required)" in said


def test_every_example_is_right(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words behind `moetrain COMMAND` in each example are overrides of known options, or a file that is there."""
    monkeypatch.chdir(ROOT)
    for command, (_, example) in COMMANDS.items():
        words = shlex.split(example)
        words = words[words.index("moetrain") + 1 :]
        assert words.pop(0) == command
        if command == "bench":
            assert bench_parser().parse_args(words).subject == "layer"
            continue
        if command == "submit":
            assert main([command, *words]) == 0, (example, capfd.readouterr().err)
            continue
        words = [w for w in words if w != "--follow"]
        words = ["--run_dir", *words] if command == "report" else words
        while words:
            name, value = words.pop(0), words.pop(0)
            if name == "--config":
                assert (ROOT / value).is_file(), value
                continue
            pairs = [name, value] + (["--upcycle.dense", "x", "--upcycle.output", "y"] if command == "upcycle" else [])
            pairs += ["--prepare.inputs", "[x]"] if name == "--prepare.output" else ["--prepare.output", "x"] if name == "--prepare.inputs" else []
            pairs += ["--train.steps", "1", "--train.global_batch_size", "1", "--train.micro_batch_size", "1"] if command == "train" else []
            assert main(["config", *pairs]) == 0, (example, capfd.readouterr().err)


def test_usage_and_wrong_words(capfd: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        said = capfd.readouterr().out
        assert all(f"  {name} " in said for name in COMMANDS)
    assert main(["--version"]) == 0 and capfd.readouterr().out == f"{__version__}\n"
    assert main(["evaluate"]) == 2 and "did you mean eval?" in capfd.readouterr().err
    # What old launchers add is no word of ours.
    assert main(["--local_rank=0", "--version"]) == 0


def test_config_and_schema(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config` prints what it would use, and reads its own output."""
    monkeypatch.chdir(tmp_path)
    assert main(["config", "--config", str(ROOT / "configs/quickstart/dense.yaml"), "--train.lr", "1e-3"]) == 0
    said = capfd.readouterr().out
    tree = parse_yaml(said, "printed")
    assert tree["train"]["lr"] == 1e-3 and tree["train"]["beta2"] == 0.95 and tree["model"]["num_kv_heads"] == 2
    (tmp_path / "printed.yaml").write_text(said)
    assert main(["config", "--config", "printed.yaml"]) == 0 and capfd.readouterr().out == said
    assert main(["config", "--schema"]) == 0
    assert json.loads(capfd.readouterr().out)["properties"]["run_dir"]["default"] == "runs/default"


def test_doctor(place: Path) -> None:
    """As a program, for programs. (Its report for people is tested with its module.)"""
    facts = json.loads(moetrain(place, "doctor", "--json"))
    assert facts["moetrain"] == __version__ and "CPU" in facts["extension"]["devices"] and facts["uses"]["attention"]


def test_a_rank_ends_without_taking_the_interpreter_down(tmp_path: Path) -> None:
    """With its own status, after what was registered for the end and with all that was printed; a process alone ends as always."""
    code = (
        "import atexit, moetrain.cli as cli\n"
        "class Held:\n    def __del__(self): print('taken down')\n"
        "held = Held()\natexit.register(print, 'registered')\ncli.main = lambda: 3\nprint('printed')\ncli.program()"
    )
    for world, last in (("2", ""), ("1", "taken down\n")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": world}
        done = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
        assert (done.returncode, done.stdout) == (3, f"printed\nregistered\n{last}"), done.stderr
