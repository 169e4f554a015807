"""Fast training of the Transformer VAE of *Interaction Asymmetry* (arXiv 2411.07784), and its fused attention op."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

try:
    __version__ = version("fastslots")
except PackageNotFoundError:  # a checkout that is not installed
    _project = Path(__file__).parents[1] / "pyproject.toml"
    __version__ = re.findall(r'^version = "(.*)"', _project.read_text(), re.M)[0] if _project.exists() else "unknown"

if find_spec("fastslots.kernels") is None:
    # This is a checkout's own folder, not an installation: `kernels` and `bench`, which are installed inside the
    # package, lie beside it. Only the C++ module is missing then, which takes a build.
    __path__.append(str(Path(__file__).parents[1]))
