"""`python -m tests.mutations`; see the package."""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutations import LIMIT, Copy, Mutation, Outcome, read_mutations


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="plant errors in a copy of the package and see that tests fail")
    parser.add_argument("names", nargs="*", help="some of them; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="copies in which mutations are planted at the same time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for the tests of one")
    parser.add_argument("--table", type=Path, help="write the result as a Markdown table")
    parser.add_argument("--trust", action="store_true", help="leave out the run of the named tests without a mutation")
    options = parser.parse_args()
    mutations = read_mutations()
    if unknown := set(options.names) - {m.name for m in mutations}:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    mutations = [m for m in mutations if not options.names or m.name in options.names]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for i in range(options.jobs):
            copies.put(Copy(Path(folder) / str(i)))
        if not options.trust:
            tests = sorted({t for m in mutations for t in m.tests})
            copy = copies.get()
            status, failures, output = copy.run(tests, 60 * len(tests))
            copies.put(copy)
            print(f"without a mutation: {len(tests)} tests, {'all pass' if status == 0 else 'NOT ALL PASS'}", flush=True)
            if status != 0:
                print("\n".join(failures) or output)
                return 1

        def one(mutation: Mutation) -> Outcome:
            copy = copies.get()
            try:
                outcome = copy.plant(mutation, options.limit)
            finally:
                copies.put(copy)
            print(f"{'caught' if outcome.caught else 'NOT CAUGHT'} {mutation.name} ({outcome.seconds:.0f} s): {outcome.said}", flush=True)
            return outcome

        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(one, mutations))
    caught = sum(o.caught for o in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    if options.table:
        options.table.write_text(table(mutations, outcomes), encoding="utf-8")
    return 0 if caught == len(outcomes) else 1


def table(mutations: list[Mutation], outcomes: list[Outcome]) -> str:
    lines = ["| planted error | in | caught by | |", "| --- | --- | --- | --- |"]
    for m, o in zip(mutations, outcomes, strict=True):
        tests = "<br>".join(f"`{t.removeprefix('tests/')}`" for t in m.tests)
        lines.append(f"| {m.name} | `{m.file}` | {tests} | {'yes' if o.caught else 'NO'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
