"""How one run's configuration is put together, and how two are compared.

Order of authority, weakest first: dataclass default, `model.preset` or the model of `run.init`, parents of the YAML file
(`base:`), the file, `key=value` on the command line. omegaconf and yaml are loaded only inside the functions that need them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from moe.config.knobs import UserError, nearest
from moe.config.model import PRESETS, ModelConfig
from moe.config.recipes import Recipe

PSEUDO = {  # keys that fill the model section instead of standing in it
    "model.preset": ("tiny", f"start from a named model: {', '.join(PRESETS)}"),
    "model.dense_twin": (False, "train the dense model of equal training FLOPs instead"),
}


InitModel = Callable[[str], dict[str, Any]]


def load(
    schema: type[Recipe],
    argv: list[str] | None = None,
    default_file: str | None = None,
    init_model: InitModel | None = None,
) -> Any:
    """Resolve one configuration from `config=FILE` and dotted `key=value` arguments; see the module docstring.

    `--key=value` is accepted too, `--help` prints every knob and exits, `--dry-run` sets `run.dry_run`. Raises
    `UserError` with one line for a typo (naming the nearest key), a wrong type or an impossible combination.
    init_model: path of `run.init` -> the model section of what lies there, which then stands in for the preset.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(describe(schema, default_file))
        raise SystemExit(0)
    file, overrides = default_file, []
    for arg in argv:
        text = arg.lstrip("-") if arg.startswith("--") else arg
        if text == "dry-run":
            text = "run.dry_run=true"
        key, eq, value = text.partition("=")
        key = schema.aliases.get(key, key)
        if key in ("local_rank", "local-rank"):  # the deepspeed launcher adds it
            continue
        if not eq or not key:
            raise UserError(f"{arg!r} is not key=value; write for example train.steps=100, or --help for every knob")
        if key == "config":
            file = value
        else:
            overrides.append((key, value))
    raw: dict[str, Any] = {}
    for layer in read_yaml(file) if file else []:
        merge(raw, layer)
    types_by_key = leaf_types(schema)
    for key, value in overrides:
        merge(raw, nest(key, parse_value(key, value, types_by_key)))
    return resolve(schema, raw, init_model)


def resolve(schema: type[Recipe], raw: dict[str, Any], init_model: InitModel | None = None) -> Any:
    """Nested plain values -> a checked instance of `schema`. `raw["model"]` may hold `preset` and `dense_twin`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = leaf_types(schema)
    raw = json.loads(json.dumps(raw))  # a private copy
    _check_keys(raw, known, schema.unused)
    model = dict(raw.get("model") or {})
    preset, twin = model.pop("preset", PSEUDO["model.preset"][0]), model.pop("dense_twin", False)
    if not isinstance(twin, bool):
        raise UserError(f"model.dense_twin={twin!r} must be true or false")
    try:
        structured = OmegaConf.structured(schema)
        if "model" in {f.name for f in fields(schema)}:
            init = (raw.get("run") or {}).get("init")
            if init and init_model:
                model = {**init_model(init), **model}
            elif preset is not None:
                ModelConfig.preset(str(preset))  # an unknown name fails here
                model = {"name": str(preset), **PRESETS[str(preset)], **model}
            raw["model"] = model
        config = OmegaConf.to_object(OmegaConf.merge(structured, OmegaConf.create(raw)))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, raw, known)) from None
    if twin:
        config.model = config.model.dense_twin()
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values; `resolve(type(config), to_dict(config))` gives an equal one."""
    values = dataclasses.asdict(config)
    for key in config.unused:
        section, _, name = key.partition(".")
        del values[section][name]
    if "model" in values:
        values["model"] = {"preset": None, **values["model"]}
    return values


def fingerprint(config: Any) -> str:
    """8 hex digits over everything that can change a run's numbers (not `log.*`, of `run.*` only `init`)."""
    values = to_dict(config)
    init = (values.pop("run", None) or {}).get("init")
    values = {k: v for k, v in values.items() if k != "log"} | ({"init": init} if init else {})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def differences(a: dict, b: dict) -> list[str]:
    """`key: old -> new` for every leaf in which two plain configurations differ."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    keys = sorted(left.keys() | right.keys())
    return [f"{k}: {left.get(k)} -> {right.get(k)}" for k in keys if left.get(k) != right.get(k)]


def describe(schema: type[Recipe], default_file: str | None = None) -> str:
    """The text of `--help`: every knob with its default, type and meaning."""
    defaults = load(schema, [], default_file) if default_file else schema()
    lines = ["usage: RECIPE [config=FILE] [key=value ...] [--dry-run] [--help]", ""]
    if default_file:
        lines += [f"defaults shown are those of {default_file}, which config=FILE replaces", ""]
    lines += [f"  {'config=FILE':34s} YAML that says only what differs; `base: other.yaml` names a parent"]
    for short, key in schema.aliases.items():
        lines.append(f"  {short + '=...':34s} short for {key}")
    for key, (default, meaning) in PSEUDO.items() if "model" in {f.name for f in fields(schema)} else []:
        lines.append(f"  {key + '=' + _show(default):34s} {meaning}")
    for section in fields(schema):
        values = getattr(defaults, section.name)
        lines += ["", f"{section.name}:"]
        for f in fields(values):
            if f"{section.name}.{f.name}" in schema.unused:
                continue
            shown = f"{section.name}.{f.name}={_show(getattr(values, f.name))}"
            choices = f.metadata.get("choices")
            note = f" (one of {', '.join(map(str, choices))})" if choices else ""
            lines.append(f"  {shown:34s} {f.metadata.get('meaning', '')}{note}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value).replace(" ", "")


def read_yaml(file: str, seen: tuple[str, ...] = ()) -> list[dict]:
    """The file's parents first, then the file itself."""
    import yaml

    path = os.path.abspath(file)
    if path in seen:
        raise UserError(f"config file {file} is its own ancestor through base:; remove one base: line")
    try:
        with open(path, encoding="utf-8") as handle:
            content = _yaml(handle) or {}
    except FileNotFoundError:
        raise UserError(f"config file {file} does not exist; see recipes/configs for those that come along") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config file {file} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {file} must hold sections such as 'model:' and 'train:'")
    base = content.pop("base", None)
    parents = read_yaml(os.path.join(os.path.dirname(path), base), (*seen, path)) if base else []
    return [*parents, _expand_dots(content)]


def _yaml(text: Any) -> Any:
    """YAML in which 1e-3 is a number, as everyone who types it means it (YAML 1.1 reads text), and a key stands once."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for i, (key, _) in enumerate(node.value):
                if key.value in keys[:i]:  # the last would win, and nobody would know
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.load(text, Loader)  # a SafeLoader: plain values only


def _expand_dots(content: dict) -> dict:
    """YAML may write `train.steps: 5` at the top level as well as nested sections."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        merge(result, nest(str(key), value))
    return result


def nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(into: dict, layer: dict) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and key != "rope_scaling":
            merge(into[key], value)
        else:
            into[key] = value


def _leaves(values: dict, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and key != "rope_scaling":
            yield from _leaves(value, name + ".")
        else:
            yield name, value


def leaf_types(schema: type[Recipe]) -> dict[str, Any]:
    """Dotted key -> annotation, for every knob of every section."""
    result: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for section in fields(schema):
        inner = hints[section.name]
        for f in fields(inner):
            if f"{section.name}.{f.name}" not in schema.unused:
                result[f"{section.name}.{f.name}"] = typing.get_type_hints(inner)[f.name]
    if "model" in hints:
        for key, (default, _) in PSEUDO.items():
            result[key] = type(default)
    return result


def _check_keys(raw: dict, known: dict[str, Any], unused: frozenset[str]) -> None:
    sections = sorted({k.split(".")[0] for k in known})
    for name, value in raw.items():
        if name not in sections:
            tail = [k for k in known if k.endswith(f".{name}")]
            hint = f"; did you mean '{tail[0]}'?" if tail else nearest(name, [*sections, *known])
            raise UserError(f"{name} is not a section of this configuration{hint}")
        if not isinstance(value, dict):
            example = next(k for k in known if k.startswith(name + "."))
            raise UserError(f"{name}={value} is a whole section; set one of its keys, such as {example}=...")
    for key, _ in _leaves(raw):
        if key in unused:
            raise UserError(f"{key} means nothing to this recipe; leave it out")
        if key not in known:
            base = key.split(".")[0]
            same = {k.split(".")[-1]: k for k in known if k.startswith(base + ".")}
            elsewhere = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            close = difflib.get_close_matches(key.split(".")[-1], same, n=1, cutoff=0.6)
            found = elsewhere[:1] or [same[c] for c in close]
            hint = f"; did you mean {found[0]!r}?" if found else nearest(key, known)
            raise UserError(f"{key} is not a knob{hint} (--help lists them all)")


def parse_value(key: str, text: str, known: dict[str, Any]) -> Any:
    """A command-line value, read by the knob's type so that strings stay strings and 1e3 may be an integer."""
    import yaml

    hint = known.get(key)
    allowed = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if text == "" and str not in allowed:
        raise UserError(f"{key}= has no value; write {key}=VALUE")
    if text in ("null", "None") and (type(None) in allowed or hint is Any):
        return None
    if str in allowed:
        return text
    try:
        value = _yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text} cannot be read as a value") from None
    if isinstance(value, str) and float in allowed:
        try:
            value = float(value)  # nan and inf, which the range check then refuses by name
        except ValueError:
            pass
    if isinstance(value, float) and int in allowed and float not in allowed and value.is_integer():
        value = int(value)
    return value


def _one_line(error: Exception, raw: dict, known: dict[str, Any]) -> str:
    key = getattr(error, "full_key", None) or ""
    value = dict(_leaves(raw)).get(key)
    hint = known.get(key)
    if hint is not None:
        names = [
            a.__name__ for a in (typing.get_args(hint) or (hint,)) if a is not type(None) and hasattr(a, "__name__")
        ]
        kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}
        what = " or ".join(kinds.get(n, n) for n in names) or str(hint)
        return f"{key}={value} must be {what}"
    return f"{key}: {str(error).splitlines()[0]}"
