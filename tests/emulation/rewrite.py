"""The two things in a .cu file that are no C++, rewritten for the emulator: launches, and variables in shared memory. All else stays as it is, on
its line."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "([{", ")]}"


def rewrite(text: str, name: str) -> str:
    """The text of a .cu file as C++. `name` is what compilers and debuggers shall call it.

    `kernel<T><<<grid, block, bytes, stream>>>(a, b)` becomes `::emulator::launch("kernel<T>", ::emulator::Config(grid, block, bytes, stream),
    kernel<T>, a, b)`. `__shared__ T x[N];` becomes a reference to memory of the block, `extern __shared__ T x[];` a pointer to it. Raises
    ValueError with the line of what can't be rewritten."""
    return f'#line 1 "{name}"\n' + _shared(_launches(text, name), name)


def _blank(text: str) -> str:
    """The text with comments, strings and characters replaced by blanks of the same length, so that brackets in them aren't seen."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-zA-Z_])\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _closing(code: str, place: int) -> int:
    """Where the bracket that opens at `place` closes; -1 if it doesn't."""
    expected = []
    for i in range(place, len(code)):
        if code[i] in _OPEN:
            expected.append(_CLOSE[_OPEN.index(code[i])])
        elif code[i] in _CLOSE:
            if code[i] != expected.pop():
                return -1
            if not expected:
                return i
    return -1


def _end_of_config(code: str, place: int) -> int:
    """Where the >>> is that ends the launch's configuration, which begins at `place`: the first outside brackets."""
    while place < len(code):
        if code.startswith(">>>", place):
            return place
        if code[place] in _OPEN:
            place = _closing(code, place)
            if place < 0:
                return -1
        elif code[place] in _CLOSE + ";":
            return -1
        place += 1
    return -1


def _start_of_kernel(code: str, end: int) -> int:
    """Where the name that ends at `end` begins, template arguments and namespaces included."""
    place = end
    if code[place - 1] == ">":
        depth = 0
        while place > 0:
            place -= 1
            if code[place] in _CLOSE:  # a comparison in parentheses is no template bracket
                opened, place = 1, place - 1
                while place >= 0 and opened:
                    opened += (code[place] in _CLOSE) - (code[place] in _OPEN)
                    place -= 1
                place += 1
            elif code[place] == ">" and code[place - 1] != "-":
                depth += 1
            elif code[place] == "<":
                depth -= 1
                if depth == 0:
                    break
        while place > 0 and code[place - 1].isspace():
            place -= 1
    start = place
    while start > 0 and (code[start - 1].isalnum() or code[start - 1] in "_:"):
        start -= 1
    return start if start < place else -1


def _launches(text: str, name: str) -> str:
    code, done, parts = _blank(text), 0, []
    for found in re.finditer(r"<<<", code):
        opening = found.start()
        closing = _end_of_config(code, opening + 3)
        arguments = re.compile(r"\s*\(").match(code, closing + 3) if closing >= 0 else None
        start = _start_of_kernel(code, len(code[:opening].rstrip()))
        if closing < 0 or arguments is None or start < done:
            raise ValueError(f"{name}:{_line(text, opening)}: this launch can't be read")
        kernel, between, config = text[start:opening].rstrip(), text[start:opening], text[opening + 3 : closing]
        gap = between[len(kernel) :]  # keeps the lines
        empty = not code[arguments.end() :].lstrip().startswith(")")
        title = " ".join(kernel.split()).replace('"', "'")
        parts += [text[done:start], f'::emulator::launch("{title}", ::emulator::Config({config}), {kernel}{gap}', ", " if empty else ""]
        done = arguments.end()
    return "".join([*parts, text[done:]])


_SHARED = re.compile(
    r"(extern\s+)?\b__shared__\s+(?:__align__\(\w+\)\s*|alignas\(\w+\)\s*)?"  # what it is aligned to is true of all memory here
    r"((?:[\w:]+(?:<[^;=]*>)?[\s*]+)+)(\w+)\s*((?:\[[^\]]*\]\s*)*);"
)


def _shared(text: str, name: str) -> str:
    code = _blank(text)

    def one(found: re.Match[str]) -> str:
        external, kind, variable, sizes = (found[i] and found[i].strip() for i in range(1, 5))
        if external:
            return f"{kind}* const {variable} = static_cast<{kind}*>(::emulator::dynamic_shared());"
        number = _line(text, found.start())
        memory = f"::emulator::shared({number}, sizeof({variable}_shared))"
        return f"typedef {kind} {variable}_shared{sizes}; {variable}_shared& {variable} = *static_cast<{variable}_shared*>({memory});"

    places = list(_SHARED.finditer(code))
    lines = [_line(text, p.start()) for p in places]
    if len(places) != len(re.findall(r"\b__shared__\b", code)) or len(set(lines)) != len(lines):
        raise ValueError(f"{name}: a variable in shared memory must be declared alone, on a line of its own, as `__shared__ T name[N];`")
    parts, done = [], 0
    for found in places:
        parts += [text[done : found.start()], one(found)]
        done = found.end()
    return "".join([*parts, text[done:]])
