"""From a file and the command line to a checked config, and back to YAML.

`load_config` is the one way in; it names every mistake at once, and the nearest known key."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from moetrain.config.base import ConfigError, Section, short
from moetrain.config.routers import ROUTERS, RouterOptions
from moetrain.config.rules import check
from moetrain.config.sections import Config

_File = TypeVar("_File", bound=BaseModel)


MAX_BYTES, MAX_VALUES, MAX_PROBLEMS = 1 << 20, 100_000, 20
"""Of a file; of a file with all aliases written out; of one error message."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers people write: `3e-4` and `1e6` are numbers, `no` and `12:30` are strings, a key given twice is an error.

    Plain data only: a tag (`!!python/...`, `!!int`) is an error, as is an alias to what it stands in, or aliases of aliases that would be a tree
    larger than any config."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"tags are not read, found {short(event.tag)}", event.start_mark)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is recursive: it stands in what it names", event.start_mark)
        else:
            inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
            self._sizes[id(node)] = 1 + (0 if isinstance(inner, str) else sum(self._sizes[id(n)] for n in inner))
        if self._sizes[id(node)] > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES:,} values", event.start_mark)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?"
_Loader.add_implicit_resolver("!number", re.compile(rf"^{_NUMBER}$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"), list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would take for a number."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
# PyYAML writes U+0085 and its like bare, where they would be read as ends of lines; between double quotes it escapes them.
_Dumper.add_representer(str, lambda d, v: d.represent_scalar("tag:yaml.org,2002:str", v, style=None if v.isprintable() else '"'))
_Dumper.add_representer(float, lambda d, v: d.represent_scalar("!number", repr(v)))
_Dumper.add_representer(int, lambda d, v: d.represent_scalar("!number", str(v)))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = node.value.replace("_", "").lower()
    if re.fullmatch(r"[-+]?\d+", text) and len(text) < 1000:  # Python's int() refuses thousands of digits
        return int(text)
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text:
        raise yaml.constructor.ConstructorError(None, None, f"the number {short(node.value)} is too large", node.start_mark)
    # 1e6 is a whole number; 3.0 stays a float, since whoever writes the point means one.
    return int(value) if "." not in text and "n" not in text and value == int(value) else value


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!number", _number)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; `where` names it in errors (ConfigError)."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader without tags
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        problem = "nested too deeply" if isinstance(error, RecursionError) else problem
        raise ConfigError(f"{where}{place}: not valid YAML: {problem}") from None


def read_yaml(path: str | Path, where: str) -> Any:
    """Parse a YAML file; `where` names it in errors. Raises OSError, ConfigError."""
    with open(path, "rb") as file:  # a pipe may be a config too: what is read of it has a limit
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{where}: has more than {MAX_BYTES:,} bytes; is it a config?")
    try:
        return parse_yaml(raw.decode("utf-8"), where)
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: can't be read: not UTF-8 text") from None


def _apply_override(tree: dict[str, Any], key: str, text: str) -> None:
    node: Any = tree
    parts = key.split(".")
    # Text stands for itself: the prompt `def main():` would be a mapping in YAML, the folder 2024 a number.
    kind = keys(Config).get(_generic(parts))
    value = text if text == "" or kind is str or (kind == str | None and text != "null") else parse_yaml(text, f"--{key}")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--{key}: {'.'.join(parts[:i])} is a list of {len(node)}; {part!r} is no place in it")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise ConfigError(f"--{key}: {'.'.join(parts[:i])} is a value, not a section")
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """['--train.lr', '3e-4', '--resume=false'] -> [('train.lr', '3e-4'), ('resume', 'false')]."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}; an override is --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ConfigError(f"--{key}: a value is missing; write --{key} VALUE or --{key}=VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    model_from: Callable[[str, str], dict[str, Any]] | None = None,
) -> Config:
    """Read, override, check.

    path: YAML file, or None for overrides alone. overrides: (dotted key, YAML text) pairs. model_from: given the folder named by
    `init_from`, returns its `model` section, on which the file's own is laid. Raises ConfigError with every reason.
    """
    where = str(path) if path is not None else "command line"
    tree: Any = {}
    if path is not None:
        try:
            tree = read_yaml(path, f"config {where}")
        except OSError as error:
            raise ConfigError(f"config {where}: can't be read: {error.strerror}") from None
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise ConfigError(f"config {where}: must be a mapping of sections, found {type(tree).__name__}")
    for key, value in overrides:
        _apply_override(tree, key, value)
    given, folder = tree.get("model") or {}, tree.get("init_from")
    if model_from is not None and isinstance(folder, str) and folder and isinstance(given, dict):
        run_dir = tree.get("run_dir")
        tree["model"] = _merge(model_from(folder, run_dir if isinstance(run_dir, str) else Config.model_fields["run_dir"].default), given)
        _forget_idle(tree["model"], given)
    return config_from_dict(tree, where)


def _forget_idle(model: dict[str, Any], given: dict[str, Any]) -> None:
    """Drop the router options of the start weights' folder that the file's own options leave without effect: the user never wrote them."""
    for key in ("moe", "router"):
        model, given = (node.get(key) if isinstance(node, dict) else None for node in (model, given))
    kind = ROUTERS.get(model.get("type")) if isinstance(model, dict) else None
    try:
        idle = set() if kind is None else kind.model_validate(model).idle()
    except ValidationError:
        return
    for name in idle - set(given or {}):
        model.pop(name, None)


def config_from_dict(tree: dict[str, Any], where: str = "given") -> Config:
    """Validate a nested dict. Raises ConfigError with every reason."""
    return validate(Config, tree, f"config {where}", check)


def validate(cls: type[_File], tree: dict[str, Any], where: str, rules: Callable[[_File], list[str]]) -> _File:
    """A file's content as `cls`, whose cross-field `rules` name what they find broken. Raises ConfigError with every reason."""
    try:
        found = cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_lines(where, [_explain(item, cls) for item in error.errors()])) from None
    problems = rules(found)
    if problems:
        raise ConfigError(_lines(where, problems))
    return found


def _lines(where: str, problems: list[str]) -> str:
    head = f"{where}: "
    if len(problems) == 1:
        return head + problems[0]
    more = len(problems) - MAX_PROBLEMS
    shown = [*problems[:MAX_PROBLEMS], *([f"... and {more} more"] if more > 0 else [])]
    return head + f"{len(problems)} errors\n" + "\n".join(f"  {p}" for p in shown)


def _explain(item: Any, cls: type[BaseModel]) -> str:
    # pydantic puts the tag of a union ("topk", "list") behind the option that has one; it is no key of the user's.
    location = [_shown(p) for i, p in enumerate(item["loc"]) if i == 0 or item["loc"][i - 1] not in ("router", "layers", "expert_dim")]
    name = ".".join(location) or "config"
    kind, value = item["type"], item.get("input")
    if kind == "model_type":
        return f"{name}: must be a section with keys of its own, found {short(value)}"
    if kind == "extra_forbidden":
        known = sorted(keys(cls))
        close = difflib.get_close_matches(
            location[-1], [k.rsplit(".", 1)[-1] for k in known if k.rpartition(".")[0] == _generic(location[:-1])], 1, 0.5
        )
        if close:
            return f"{name}: unknown key; did you mean {'.'.join([*location[:-1], close[0]])}?"
        elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == location[-1]] or difflib.get_close_matches(_generic(location), known, 1, 0.6)
        hint = "; `moetrain config --schema` lists all keys" if cls is Config else ""
        return f"{name}: unknown key" + (f"; did you mean {elsewhere[0]}?" if elsewhere else hint)
    if kind == "missing":
        return f"{name}: missing; it has no default"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{name}.type: found {short((value or {}).get('type') if isinstance(value, dict) else value)}; one of {', '.join(ROUTERS)}"
    return f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, found {short(value)}"


def _shown(part: str | int) -> str:
    """A key as an error shows it: one line, and not as long as a file can make it."""
    return str(part) if isinstance(part, int) or (part.isprintable() and len(part) <= 60) else short(part)


def _generic(location: Sequence[str]) -> str:
    return ".".join("*" if p.isdigit() else p for p in location)


def keys(cls: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a section and their types, without bounds; '*' stands for a place in a list."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        found[prefix + name] = field.annotation
        for inner, is_list in inner_sections(field.annotation):
            found |= keys(inner, f"{prefix}{name}{'.*' if is_list else ''}.")
    return found


def inner_sections(annotation: Any, in_list: bool = False) -> list[tuple[type[BaseModel], bool]]:
    if annotation is RouterOptions:
        return [(section, in_list) for section in ROUTERS.values()]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, in_list)]
    in_list = in_list or getattr(annotation, "__origin__", None) is list
    return [s for argument in getattr(annotation, "__args__", ()) for s in inner_sections(argument, in_list)]

def to_yaml(config: BaseModel) -> str:
    """The resolved config, every default written out, as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(_drop_idle(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _drop_idle(value: Any) -> Any:
    # An option that only counts beside another one would be refused when read back as if the user had set it; it says nothing, so leave it out.
    if isinstance(value, BaseModel):
        idle = value.idle() if isinstance(value, Section) else set()
        return {k: _drop_idle(getattr(value, k)) for k in type(value).model_fields if k not in idle}
    if isinstance(value, list):
        return [_drop_idle(v) for v in value]
    return value

def to_dict(config: BaseModel) -> dict[str, Any]:
    """As `to_yaml`, as plain dicts and lists."""
    return _drop_idle(config)


def schema() -> str:
    """JSON schema of the file, for editors (`# yaml-language-server: $schema=...`)."""
    return json.dumps(Config.model_json_schema(), indent=2)


def defaults(cls: type[BaseModel]) -> dict[str, Any]:
    """Field -> default of a section; fields without one are left out."""
    return {n: f.default for n, f in cls.model_fields.items() if f.default is not PydanticUndefined}
