"""Follows one value through the calls that hand it on whole, and counts how often it returns to a room it had left.

    python scripts/follow.py                                 # config from fit, images from a step, slots from a loss
    python scripts/follow.py fastslots.train.fitting:fit:config

A room is a folder of fastslots, or a module beside them; a second count takes each file for a room. From the function
named, calls are taken in the order in which they are written, each function once, depth first; after an ``__init__``
that stores the value, the methods of the class that look at it. The value stays in the room of a function that it is
handed to: as a bare name, as some of its rows, or as an attribute that ``__init__`` has stored it in. A stay begins
where its room is not that of the stay before, and is a return where an earlier stay was in that room. That a call ends
counts for nothing: nobody hands the value on. Callees that are chosen as the program runs, and arguments behind a star,
cannot be read from the source and are left out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTS = (
    "fastslots.train.fitting:fit:config",
    "fastslots.train.step:_step:images",
    "fastslots.models.decoder:Decoder.loss:slots",
)


@dataclass
class Module:
    """What a file defines and imports."""

    name: str
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)  # "f" or "Class.f"
    bases: dict[str, list[str]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here -> (module, name there)

    @property
    def room(self) -> str:
        return self.name.split(".")[1] if "." in self.name else self.name


@cache
def module(name: str) -> Module | None:
    """A module of the package, parsed; None for any other."""
    relative = Path(*name.split("."))
    places = (ROOT / relative, ROOT / Path(*relative.parts[1:]))  # kernels and bench lie beside the package
    paths = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    if not name.startswith("fastslots") or not paths:
        return None
    out = Module(name)
    for node in ast.walk(ast.parse(paths[0].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            out.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            out.functions.setdefault(node.name, node)
        elif isinstance(node, ast.ClassDef):
            out.bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
            methods = (f for f in node.body if isinstance(f, ast.FunctionDef))
            out.functions |= {f"{node.name}.{f.name}": f for f in methods}
    return out


def lookup(here: Module, name: str, depth: int = 0) -> tuple[Module, str] | None:
    """The function, or a class's ``__init__``, that a name means in a module; through what packages hand on."""
    if name in here.functions:
        return here, name
    first, _, rest = name.partition(".")
    if first in here.bases:
        wanted = f"{first}.{rest or '__init__'}"
        if wanted in here.functions:
            return here, wanted
        parents = (lookup(here, f"{base}.{rest or '__init__'}", depth + 1) for base in here.bases[first])
        return next((parent for parent in parents if parent), None)
    if first not in here.imports or depth > 8:
        return None
    where, there = here.imports[first]
    if (submodule := module(f"{where}.{there}")) and rest:
        return lookup(submodule, rest, depth + 1)
    target = module(where)
    return lookup(target, f"{there}.{rest}" if rest else there, depth + 1) if target else None


def stays(start: str) -> Iterator[tuple[str, str]]:
    """(room, function) in the order in which the value is handed to them."""
    name, function, parameter = start.split(":")
    first = module(name)
    if first is None or function not in first.functions:
        raise SystemExit(f"{start}: no such function: name it as module:function:parameter")
    yield from _follow(first, function, parameter, set(), {})


def _follow(
    here: Module, function: str, parameter: str, done: set[tuple[str, str]], stored: dict[str, set[str]]
) -> Iterator[tuple[str, str]]:
    if (here.name, function) in done:
        return
    done.add((here.name, function))
    yield here.room, f"{here.name}:{function}"
    owner = function.rpartition(".")[0]
    names, held = {parameter}, stored.setdefault(f"{here.name}.{owner}", set())
    for node in _in_order(here.functions[function]):
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node):
                if _is(value, names, held):
                    names |= {target.id} if isinstance(target, ast.Name) else set()
                    held |= {target.attr} if isinstance(target, ast.Attribute) else set()
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        called = f"{owner}.{called.removeprefix('self.')}" if owner and called.startswith("self.") else called
        target = lookup(here, called)
        if target is None:
            continue
        there, name = target
        arguments = [a.arg for a in there.functions[name].args.args if a.arg not in ("self", "cls")]
        arguments += [a.arg for a in there.functions[name].args.kwonlyargs]
        handed = [p for p, a in zip(arguments, node.args, strict=False) if _is(a, names, held)]
        handed += [k.arg for k in node.keywords if k.arg and _is(k.value, names, held)]
        if handed:
            yield from _follow(there, name, handed[0], done, stored)
    if function.endswith(".__init__") and held:  # whoever made the object calls its methods
        for method in [f for f in here.functions if f.startswith(f"{owner}.") and _uses(here.functions[f], held)]:
            yield from _follow(here, method, "", done, stored)


def _uses(function: ast.FunctionDef, held: set[str]) -> bool:
    """Whether a method looks at what the object holds."""
    return any(_is(node, set(), held) for node in ast.walk(function) if isinstance(node, ast.Attribute))


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each target of an assignment with its value, those of ``a, b = c, d`` one by one."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def _in_order(function: ast.FunctionDef) -> list[ast.AST]:
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Call | ast.Assign)]
    return sorted(nodes, key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0))


def _is(node: ast.AST, names: set[str], held: set[str]) -> bool:
    """Whether an expression is the value itself, or some of its rows."""
    if isinstance(node, ast.Subscript):
        return _is(node.value, names, held)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr in held
    return isinstance(node, ast.Name) and node.id in names


def rooms(start: str, by_file: bool = False) -> list[str]:
    """The rooms of the stays, neighbours that are alike taken together."""
    route = [function.split(":")[0] if by_file else room for room, function in stays(start)]
    return [room for room, _ in groupby(route)]


def returns(start: str, by_file: bool = False) -> int:
    """How often the value comes back to a room that it had left."""
    route = rooms(start, by_file)
    return len(route) - len(set(route))


if __name__ == "__main__":
    for start in sys.argv[1:] or STARTS:
        for by_file in (False, True):
            route = rooms(start, by_file)
            print(
                f"{start}: {len(route)} stays in {'files' if by_file else 'rooms'}, {returns(start, by_file)} returns"
            )
        print(f"  {' -> '.join(rooms(start))}")
        for room, function in stays(start) if len(sys.argv) > 1 else ():
            print(f"    {room:<12} {function}")
