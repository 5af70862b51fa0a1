"""`moetrain bench SUBJECT`: its words, and the run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from moetrain.config import Config, ConfigError

SUBJECTS = {
    "layer": "one sparse layer against the dense FFN of the same FLOPs and every rival that is installed",
    "dispatch": "rows to the ranks of their experts and back, against the exchange alone and a row for each route",
    "train": "where the time of a config's training step goes; takes the words of moetrain train, under its launchers as well",
    "kernels": "each operator as a share of what this machine's memory or arithmetic allows",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"bench: {message}; see moetrain bench --help")


def _count(word: str) -> int:
    value = int(word)
    if value < 1:
        raise ValueError
    return value


_count.__name__ = "number"  # argparse's message names the type


def parser() -> argparse.ArgumentParser:
    from moetrain.bench.layer import DTYPES, ROUTINGS, SHAPES

    parse = _Parser(prog="moetrain bench", add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("subject", choices=SUBJECTS, help="; ".join(f"{name}: {what}" for name, what in SUBJECTS.items()))
    parse.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help=f"{', '.join(SHAPES)}, or T,D,F,E,k (~k: k in the mean)")
    parse.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    routings = "router: each layer's own; balanced, skew: the same routes for all, even or half of the experts with 8 times the others' share"
    parse.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), metavar="ROUTING", help=routings)
    parse.add_argument("--rounds", type=_count, default=9, help="how often each contestant runs (default 9)")
    parse.add_argument("--threads", type=_count, help="threads of every contestant (default: torch's)")
    parse.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="layer and kernels only: what computes (default cpu)")
    parse.add_argument("--ranks", type=_count, default=2, help="dispatch only: processes on this machine (default 2)")
    parse.add_argument("--no-rivals", action="store_true", help="only our layer and the dense limit")
    parse.add_argument("--json", metavar="FILE", help="write tables, machine and versions")
    parse.add_argument("--plot", metavar="FILE", help="layer only: draw the shares (needs matplotlib)")
    return parse


def main(words: Sequence[str], read: Callable[[list[str]], Config]) -> int:
    """read: gives the config that the words of `moetrain train` say."""
    options, others = parser().parse_known_args(list(words))
    if others and options.subject != "train":
        raise ConfigError(f"bench: unrecognized arguments: {' '.join(others)}; see moetrain bench --help")
    import torch

    from moetrain.bench import dispatch, kernels, layer, measure, train

    if options.plot and options.subject != "layer":
        raise ConfigError(f"bench: --plot draws the subject layer, not {options.subject}; use --json")
    if options.device == "cuda":
        if options.subject not in ("layer", "kernels"):
            raise ConfigError(f"bench: --device cuda goes with layer and kernels, not {options.subject}")
        if not torch.cuda.is_available():
            raise ConfigError("bench: --device cuda: torch finds no CUDA device; moetrain doctor says more")
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.subject != "train":
        measure.keep_memory()
    shapes = [layer.parse_shape(word) for word in options.shapes]
    dtypes = [layer.DTYPES[word] for word in options.dtypes]
    if options.subject == "layer":
        tables = layer.run(shapes, dtypes, options.routings, options.rounds, not options.no_rivals, device)
    elif options.subject == "dispatch":
        tables = dispatch.run(shapes, dtypes, options.routings, options.rounds, options.ranks)
    elif options.subject == "train":
        tables = train.run(read(others), options.rounds)
        if not tables:
            return 0  # of another rank than 0
    else:
        tables = kernels.run(shapes, dtypes, device=device)
    print("\n\n".join("\n".join(table.lines()) for table in tables))
    if options.json:
        measure.save(options.json, tables, words)
    if options.plot:
        layer.plot(tables[0], options.plot)
    return 0
