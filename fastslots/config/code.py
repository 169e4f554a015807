"""Your own code, named ``package.module:function``: imported when you say so, and known again by its source.

A run's configuration may name code. Whoever opens somebody else's run must not run that code unawares, so a name that
comes from a file is imported only where the user has named it himself or trusts it (``check_trusted``).
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastslots.errors import UserError, first_line

GIVEN = "python:"  # begins what stands in a run's files for something that Python code gave to ``fit``
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
INSTALLED = ("site-packages", "dist-packages")
_loaded: dict[str, Code] = {}
_trusted: set[str] = set()  # names that the user of this process has named, or trusts


class CodeWarning(UserWarning):
    """Code is not what it was."""


@dataclass(frozen=True)
class Code:
    """Code by its name, and where it was when it was loaded. All empty: none of one's own."""

    name: str = ""
    file: str = ""  # of its module
    folder: str = ""  # the module was imported from
    digest: str = ""  # of the file and of those beside it that it uses


def check_name(field: str, name: str) -> None:
    """UserError where ``name`` is no package.module:function (nor empty, nor stands for something of Python's)."""
    if name and not name.startswith(GIVEN) and not NAME.fullmatch(name):
        raise UserError(f"{field} must be package.module:function, got {name!r}")


def trust(name: str) -> None:
    """Note that the user of this process has named this code, or trusts it."""
    _trusted.add(name)


def check_trusted(name: str, named_by: str | Path) -> None:
    """UserError where a file names code that the user has neither named nor said to trust; nothing is imported."""
    if name.startswith(GIVEN):
        what = name.removeprefix(GIVEN)
        raise UserError(f"{named_by} was made with {what}: name what builds it with --model package.module:function")
    if name and name not in _trusted:
        raise UserError(
            f"{named_by} names code, {name}, which would be imported: add --trust-code where you trust it, or "
            f"name it yourself with --model"
        )


def load_code(name: str, folder: str = "") -> Callable[..., Any]:
    """The function that ``package.module:function`` names, importing its module.

    The working directory counts as a place of modules, after all others, and so does ``folder``, where the code was
    when a run was trained. Raises UserError that says what is missing.
    """
    check_name("code", name)
    module_name, _, path = name.partition(":")
    for place in (
        str(Path.cwd()),
        folder,
    ):  # at the end: a torch.py that lies there must not hide the installed package
        if place and place not in sys.path:
            sys.path.append(place)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            places = f"{Path.cwd()}" + (f" or {folder}" if folder else "")
            raise UserError(
                f"{name}: there is no module {error.name!r} in {places}, nor is it installed: start where it lies, "
                f"or install it"
            ) from None
        raise UserError(f"{name}: its module imports {error.name!r}, which is not installed") from None
    except Exception as error:  # somebody's module may raise anything while it is imported
        raise UserError(f"{name}: importing its module fails ({type(error).__name__}: {first_line(error)})") from error
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            known = sorted(key for key, v in vars(module).items() if callable(v) and not key.startswith("_"))
            raise UserError(f"{name}: {module.__file__} has no {path!r}; it has {', '.join(known) or 'no function'}")
        value = getattr(value, part)
    if not callable(value):
        raise UserError(f"{name} is a {type(value).__name__}, and no function")
    if name not in _loaded:
        _loaded[name] = _look_at(name)
    function: Callable[..., Any] = value
    return function


def name_of(function: Callable[..., Any]) -> str:
    """``package.module:function`` that leads back to it in another process; "" where none does."""
    module, path = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    name = f"{module}:{path}"
    if not NAME.fullmatch(name) or module == "__main__":
        return ""
    value: Any = sys.modules.get(module)
    for part in path.split("."):
        value = getattr(value, part, None)
    return name if value is function else ""


def code_of(name: str) -> Code:
    """Of code that ``load_code`` has loaded, as it was then. The hash covers its module and what that uses of its own
    package; of a module in no package, of its folder."""
    return _loaded[name]


def changed(code: Code) -> str:
    """What is said of code that is not what a run was trained with."""
    return f"{code.file} is not as it was when the run was trained: {code.name} may build another model"


def _look_at(name: str) -> Code:
    module = sys.modules[name.partition(":")[0]]
    if not getattr(module, "__file__", None):
        return Code(name)
    file, dots, is_package = (
        Path(str(module.__file__)).resolve(),
        module.__name__.count("."),
        hasattr(module, "__path__"),
    )
    folder = file.parents[dots + is_package]
    home = folder / module.__name__.partition(".")[0] if dots or is_package else folder
    files = {file} if home.name in INSTALLED else _used(module, home, set())
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return Code(name, str(file), str(folder), digest.hexdigest())


def _used(module: ModuleType, home: Path, seen: set[Path]) -> set[Path]:
    """Files under ``home`` of a module and of the modules whose names it holds; installed packages are left out."""
    file = Path(str(getattr(module, "__file__", None) or "")).resolve()
    own = home in file.parents and not set(INSTALLED).intersection(file.relative_to(home).parts)
    if file in seen or file.suffix != ".py" or not own:
        return seen
    seen.add(file)
    for value in list(vars(module).values()):
        owner = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
        if owner is not None:
            _used(owner, home, seen)
    return seen
