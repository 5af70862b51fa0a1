"""The `moetrain` program: parse, build the config, call one function.

Exit status: 0; 1 for a run that failed; 2 for wrong input, with a line that says what to do; 130 when interrupted.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from moetrain import config as schema
from moetrain import preempt
from moetrain.config import Config, ConfigError

_plain_warning = warnings.formatwarning
_WIDEST = 1000
"""Characters in a line of an error. What is wrong stands at its beginning, the way out at its end."""

COMMANDS = {
    "prepare": (
        "text, jsonl, jsonl.zst, parquet -> tokenized .bin/.idx data",
        "moetrain prepare --prepare.inputs '[book.txt, corpus.jsonl.zst]' --prepare.output data/corpus",
    ),
    "upcycle": (
        "dense Hugging Face checkpoint -> mixture of experts",
        "moetrain upcycle --upcycle.dense llama/ --upcycle.output llama-dsmoe/ --upcycle.num_experts 8",
    ),
    "train": (
        "train from scratch, from a checkpoint, or go on",
        "torchrun --standalone --nproc-per-node 2 -m moetrain train --config configs/quickstart/moe.yaml --train.lr 3e-4",
    ),
    "eval": (
        "perplexity and cost per token on held-out sets",
        "moetrain eval --run_dir runs/moe --eval.output result.json",
    ),
    "generate": (
        "text from a prompt",
        "moetrain generate --run_dir runs/moe --generate.prompt 'def main' --generate.max_new_tokens 100",
    ),
    "export": (
        "checkpoint -> Hugging Face folder",
        "moetrain export --run_dir runs/moe --export.output exported/",
    ),
    "report": (
        "one self-contained HTML page of a run: loss, load of the experts, routing by source, speed, what went wrong",
        "moetrain report runs/moe",
    ),
    "config": (
        "check a config and print it with every default; --schema prints the JSON schema",
        "moetrain config --config configs/quickstart/moe.yaml",
    ),
    "bench": (
        "speed and memory of the sparse layer on this machine, against the dense limit and installed rivals",
        "moetrain bench layer --shapes coarse fine --dtypes bfloat16 --json layer.json",
    ),
    "submit": (
        "a config and a cluster file -> a job on Slurm, Kubernetes, a list of hosts or this machine",
        "moetrain submit configs/switch.yaml --cluster launch/clusters/slurm.yaml --dry-run --train.lr 3e-4",
    ),
    "status": ("what has become of a submitted job", "moetrain status --run_dir runs/moe"),
    "cancel": ("end a submitted job; it saves first", "moetrain cancel --run_dir runs/moe"),
    "logs": ("what a submitted job has printed; --follow goes on", "moetrain logs --run_dir runs/moe --follow"),
    "doctor": (
        "what is installed, what will be used, what to install for more; --json for programs; --ranks looks at all ranks of a launcher",
        "moetrain doctor",
    ),
}


def program() -> NoReturn:
    """`main` as a process of its own: ends it with its status.

    gloo's worker threads hold the tensors of the last collective for a moment after its end, and need the interpreter to let them go. One that
    comes too late, when the interpreter is being taken down, aborts the process, and the launcher takes a run that is done and saved for a
    failed one. So a rank ends without taking it down, after what others have registered for the end.
    """
    status = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _warning
    try:
        return _main(words)
    except (ValueError, OSError) as error:
        # Wrong input, or a file system that refuses: the message says what to do, and a traceback would hide it.
        return _fail(error, 2)
    except RuntimeError as error:
        # By name: torch is not imported for every command. The CPU's allocator has no class of its own.
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            hint = "use a smaller micro_batch_size or seq_len, activation_checkpointing: block, or more ranks (dp_shard, ep)"
            return _fail(RuntimeError(f"out of memory: {str(error).splitlines()[0]}; {hint}"), 1)
        if os.environ.get("MOETRAIN_TRACEBACK") or not str(error).startswith("step "):
            raise
        return _fail(error, 1)
    except MemoryError:
        return _fail(RuntimeError("out of memory: what was asked for is more than this process may use; use a smaller model, batch or file"), 1)
    except KeyboardInterrupt:
        print("moetrain: interrupted", file=sys.stderr)
        return 130


def _warning(message: Warning | str, category: type[Warning], file: str, number: int, line: str | None = None) -> str:
    """Ours as one line without source code; everybody else's as always."""
    if Path(__file__).parent in Path(file).parents:
        return f"moetrain: warning: {message}\n"
    return _plain_warning(message, category, file, number, line)


def _fail(error: Exception, status: int) -> int:
    if os.environ.get("MOETRAIN_TRACEBACK"):
        raise error
    rank = f" rank {os.environ.get('RANK')}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    # What a stranger's file holds must not steer the terminal, nor begin a line; ours in a list are indented.
    text = re.sub(r"\n(?!  )", r"\\n", text.strip())
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    text = "\n".join(line if len(line) <= _WIDEST else f"{line[: _WIDEST - 300]} ... {line[-290:]}" for line in text.splitlines())
    print(f"moetrain{rank}: error: {text}", file=sys.stderr, flush=True)
    return status


def _main(words: list[str]) -> int:
    # The deepspeed launcher adds --local_rank and sets LOCAL_RANK as well, which is what is read.
    words = [w for w in words if not w.startswith("--local_rank=")]
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, words = words[0], words[1:]
    if command == "--version":
        from moetrain import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        raise ConfigError(f"unknown command {command!r}" + (f"; did you mean {near[0]}?" if near else f"; one of {', '.join(COMMANDS)}"))
    if "-h" in words or "--help" in words:
        print(_help(command))
        return 0
    if command == "bench":
        from moetrain.bench.main import main as bench

        return bench(words, lambda rest: _read("train", rest))
    if command in ("submit", "status", "cancel", "logs"):
        from moetrain import submit

        return submit.main(command, words)
    if command == "doctor" and "--ranks" in words:
        from moetrain.cluster import preflight

        words.remove("--ranks")
        return preflight.main(_read(command, words))
    if command == "doctor":
        from moetrain import doctor

        _only(words, "--json")
        return doctor.main(as_json="--json" in words)
    if command == "config" and "--schema" in words:
        _only(_import_files(words), "--schema")
        print(schema.schema())
        return 0
    if command == "train":
        # Before the seconds in which torch is imported, when a signal to save and end would kill.
        preempt.listen(schema.CheckpointConfig().signals)
    if command == "report" and words and not words[0].startswith("--"):
        words[:1] = ["--run_dir", words[0]]
    config = _read(command, _import_files(words))
    _RUN[command](config)
    return 0


def _import_files(words: list[str]) -> list[str]:
    """Run the Python files given with --import, which define routers of the user's own (docs/routers.md); returns the other arguments.

    Only the command line can name them: a config or a checkpoint from a stranger executes nothing.
    """
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        if word != "--import" and not word.startswith("--import="):
            rest.append(word)
            continue
        path = Path(word.partition("=")[2] if "=" in word else words.pop(0) if words else "")
        if not path.is_file():
            raise ConfigError(f"--import: {str(path)!r} is no file; name a Python file that defines a router")
        spec = importlib.util.spec_from_file_location(f"moetrain_import_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--import: {path} is no Python file (*.py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # annotations are looked up by the module's name
        spec.loader.exec_module(module)
    return rest


def _only(words: list[str], known: str) -> None:
    for word in words:
        if word != known:
            raise ConfigError(f"unexpected argument {word!r}; known: {known}")


def _read(command: str, words: list[str]) -> Config:
    path, rest = None, []
    while words:
        word = words.pop(0)
        if word == "--config" or word.startswith("--config="):
            if path is not None:
                raise ConfigError("--config is given twice")
            path = word.partition("=")[2] if "=" in word else words.pop(0) if words else ""
            if not path:
                raise ConfigError("--config: name a YAML file")
        else:
            rest.append(word)
    overrides = schema.parse_overrides(rest)
    if command == "report":
        return schema.load_config(path, overrides)  # figures, not weights: init_from may be gone
    from moetrain.build import model_from

    whole = False
    if path is None and command in ("eval", "generate", "export"):
        # A run knows its own config.
        runs = [value for key, value in overrides if key == "run_dir"]
        if runs and (Path(runs[-1]) / "config.yaml").is_file():
            path = str(Path(runs[-1]) / "config.yaml")
            # Its model section is whole, and the folder that it started from may be gone.
            whole = all(key != "init_from" for key, _ in overrides)
    return schema.load_config(path, overrides, model_from=None if whole else model_from)


def _usage() -> str:
    lines = "\n".join(f"  {name:10}{what}" for name, (what, _) in COMMANDS.items())
    return (
        f"moetrain: turns dense language models into mixtures of experts and trains them\n\n{lines}\n\n"
        f"moetrain COMMAND --help shows its options and an example. Every option can stand in the YAML file (--config FILE) or on the\n"
        f"command line (--train.lr 3e-4)."
    )


_SECTIONS = {
    "prepare": ["prepare"], "upcycle": ["upcycle"], "eval": ["eval", "data"],
    "train": ["train", "data", "parallel", "checkpoint", "watchdog", "log", "guard"],
    "generate": ["generate"], "export": ["export"], "report": ["report"],
}  # fmt: skip


def _help(command: str) -> str:
    what, example = COMMANDS[command]
    lines = [f"moetrain {command}: {what}", "", f"example: {example}", ""]
    if command == "bench":
        from moetrain.bench.main import parser

        return "\n".join([*lines, parser().format_help()])
    if command == "doctor":
        ranks = "  --ranks   under a launcher, with --config FILE: compare software, GPUs, network and disk of all ranks (submitted jobs do)"
        return "\n".join([*lines, "  --json    print facts as JSON", ranks])
    if command in ("submit", "status", "cancel", "logs"):
        from moetrain import submit

        return "\n".join([*lines, *submit.OPTIONS[command]])
    lines += [
        "  --config FILE    YAML with any of the options below",
        "  --import FILE    Python file to run first, which defines a router of your own (docs/routers.md); may be given several times",
        *(["  --schema         print the JSON schema of the file, for editors"] if command == "config" else []),
    ]
    top = [] if command in ("prepare", "upcycle") else ["run_dir"] if command == "report" else ["run_dir", "init_from"]
    for name in [*top, *(["resume"] if command == "train" else [])]:
        lines.append(_option(name, Config.model_fields[name]))
    for section in _SECTIONS.get(command, []):
        lines += _options(section, Config.model_fields[section])
    if command == "train":
        lines.append("  --model.*: the architecture; see `moetrain config --schema`")
    return "\n".join(lines)


def _options(name: str, field: FieldInfo) -> list[str]:
    sections = schema.inner_sections(field.annotation)
    if len(sections) != 1 or sections[0][1]:
        # An option, a list of sections (its entries are --data.train.0.path), or a choice of sections by their type.
        return [_option(name, field)]
    return [line for key, inner in sections[0][0].model_fields.items() for line in _options(f"{name}.{key}", inner)]


def _option(name: str, field: FieldInfo) -> str:
    default = field.default
    notes = ["required"] if field.is_required() else [f"default {default}"] if isinstance(default, (int, float, str)) and default != "" else []
    notes += ["one of " + ", ".join(map(str, get_args(field.annotation)))] if get_origin(field.annotation) is Literal else []
    notes += [f"a list of {', '.join(cls.model_fields)}" for cls, in_list in schema.inner_sections(field.annotation) if in_list]
    text = f"  --{name}" + (f" ({'; '.join(notes)})" if notes else "")
    return text + (f"\n      {field.description}" if field.description else "")


# -------------------------------------------------------------------------------------------------------------------- commands


def _prepare(config: Config) -> None:
    from rich.progress import Progress

    from moetrain.build import need
    from moetrain.data.indexed import write_counts
    from moetrain.data.prepare import DEFAULT_EXTENSIONS, prepare

    need(config, "prepare")
    options = config.prepare
    assert options is not None
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("prepare", total=None)
        report = prepare(
            options.inputs, options.output, options.tokenizer, text_key=options.text_key, extensions=options.extensions or DEFAULT_EXTENSIONS,
            exclude=options.exclude, workers=options.workers, validation_fraction=options.validation_fraction, strict=options.strict,
            max_documents=options.max_documents, seed=options.seed,
            progress=lambda p: bar.update(task, completed=p.bytes_done, total=p.bytes_total),
        )  # fmt: skip
    for split, prefix in report.prefixes.items():
        print(f"{split}: {report.documents[split]:,} documents, {report.tokens[split]:,} tokens -> {prefix}.bin")
    for prefix in report.prefixes.values() if options.counts else []:
        print(f"counts of token ids: {write_counts(prefix)}")
    for reason, count in report.skipped.items():
        print(f"left out: {count:,} ({reason})")
    if report.broken_lines:
        print(f"broken lines left out: {report.broken_lines:,}")
        for example in report.broken_examples:
            print(f"  {example}")


def _upcycle(config: Config) -> None:
    from rich.progress import Progress

    from moetrain.build import need
    from moetrain.convert.upcycle import upcycle

    need(config, "upcycle")
    assert config.upcycle is not None
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("upcycle", total=None)
        report = upcycle(config.upcycle, lambda done, total: bar.update(task, completed=done, total=total))
    print("\n".join(report.lines()))


def _train(config: Config) -> None:
    preempt.listen(config.checkpoint.signals)
    from moetrain import train

    train.run(config)


def _eval(config: Config) -> None:
    from moetrain import evaluate

    evaluate.run(config)


def _generate(config: Config) -> None:
    import torch

    from moetrain.build import DTYPES, find_trained, load_trained
    from moetrain.config import TrainConfig
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.generate import generate

    trained = find_trained(config)
    if trained.tokenizer is None:
        raise ConfigError(f"{trained.source}: no tokenizer is known for it; generate needs data that was prepared with one")
    tokenizer = load_tokenizer(trained.tokenizer)
    try:
        prompt = list(tokenizer.encode(config.generate.prompt))
    except UnicodeEncodeError:
        raise ConfigError(f"generate.prompt: {config.generate.prompt!r} is not valid UTF-8 text") from None
    if tokenizer.bos_id is not None and not prompt:
        prompt = [tokenizer.bos_id]
    if prompt and max(prompt) >= trained.config.vocab_size:
        raise ConfigError(
            f"generate.prompt: its token {max(prompt)} is beyond the model's vocab_size ({trained.config.vocab_size}); does the tokenizer "
            f"({trained.tokenizer}) belong to {trained.source}?"
        )
    train = config.train or TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_trained(trained, train, device, None)
    tokens = torch.tensor([[int(t) for t in prompt]], dtype=torch.int64, device=device)
    output = generate(model, tokens, config.generate, tokenizer.eos_id, dtype=DTYPES[train.dtype])[0].tolist()
    # A vocabulary that was rounded up has ids that no text belongs to.
    print(tokenizer.decode([t for t in output if t != tokenizer.eos_id and t < tokenizer.vocab_size]))


def _export(config: Config) -> None:
    import torch

    from moetrain.build import find_trained, need
    from moetrain.convert.extract import task_config, task_tensors
    from moetrain.convert.huggingface import architecture, write_model
    from moetrain.data.tokenizer import load_tokenizer

    need(config, "export")
    options = config.export
    assert options is not None
    trained = find_trained(config)
    if options.task is not None:
        dense = task_config(trained.config, options.task)
        trained = dataclasses.replace(trained, config=dense, tensors=task_tensors(trained.config, trained.tensors, options.task))
    tokenizer = None if trained.tokenizer is None else load_tokenizer(trained.tokenizer)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    files = write_model(options.output, trained.config, trained.tensors, dtype=dtype, max_shard_bytes=options.max_shard_bytes, tokenizer=tokenizer)
    kind = architecture(trained.config)
    print(f"{trained.source} -> {options.output} ({kind}): {', '.join(f.name for f in files)}")
    if kind == "moetrain":
        print("load it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")


def _report(config: Config) -> None:
    from moetrain import report

    print(report.write(config.run_dir, config.report.output))


def _config(config: Config) -> None:
    print(schema.to_yaml(config), end="")


_RUN: dict[str, Callable[[Config], None]] = {
    "prepare": _prepare, "upcycle": _upcycle, "train": _train, "eval": _eval, "generate": _generate, "export": _export, "report": _report,
    "config": _config,
}  # fmt: skip
