"""Fast training of the Transformer VAE of *Interaction Asymmetry* (arXiv 2411.07784), and its fused attention op.

>>> from fastslots import SlotVAE, TrainConfig, fit, cross_attention, interaction_penalty

Each name is imported when it is first asked for: ``import fastslots`` itself loads neither torch nor anything else.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("fastslots.kernels") is None:
    # This is a checkout's own folder, not an installation: `kernels` and `bench`, which are installed inside the
    # package, lie beside it. Only the C++ module is missing then, which takes a build.
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from fastslots.models import SlotVAE
    from fastslots.ops import cross_attention, explain, interaction_penalty
    from fastslots.train import TrainConfig, fit

    __version__: str

__all__ = ["SlotVAE", "TrainConfig", "__version__", "cross_attention", "explain", "fit", "interaction_penalty"]

_HOMES = {
    "SlotVAE": "fastslots.models",
    "TrainConfig": "fastslots.train",
    "cross_attention": "fastslots.ops",
    "explain": "fastslots.ops",
    "fit": "fastslots.train",
    "interaction_penalty": "fastslots.ops",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'fastslots' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    import re
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastslots")
    except PackageNotFoundError:  # a checkout that is not installed
        project = Path(__file__).parents[1] / "pyproject.toml"
        return re.findall(r'^version = "(.*)"', project.read_text(), re.M)[0] if project.exists() else "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
