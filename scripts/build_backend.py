"""The build backend: scikit-build-core, whose editable installs are made to show ``fastslots`` alone.

The sources of the package lie in fastslots, kernels and bench at the top of the checkout. scikit-build-core finds them
by an import hook, and besides puts the checkout and the folder around it on ``sys.path``. Then ``import kernels``,
which Hugging Face's libraries try, meets ours, and any folder beside the checkout can pass for a package. The hook
needs none of these paths: they are left out. (Type checkers do follow them; CONTRIBUTING.md says what to set instead.)
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  # the hooks that pip and build ask for


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, list[str] | str] | None = None,
    metadata_directory: str | None = None,
) -> str:
    name = _backend.build_editable(wheel_directory, config_settings, metadata_directory)
    keep_the_hook_alone(Path(wheel_directory) / name)
    return name


def keep_the_hook_alone(wheel: Path) -> None:
    """Rewrite ``wheel`` with the ``import`` line of its .pth file, without the paths after it."""
    with zipfile.ZipFile(wheel) as old:
        members = [(info, old.read(info)) for info in old.infolist()]
    changed: dict[str, bytes] = {}
    for info, data in members:
        if info.filename.endswith(".pth"):
            hook = [line for line in data.decode().splitlines() if line.startswith("import ")]
            changed[info.filename] = "".join(f"{line}\n" for line in hook).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for info, data in members:
            if info.filename.endswith(".dist-info/RECORD"):
                data = _record(data, changed)
            new.writestr(info, changed.get(info.filename, data))


def _record(record: bytes, changed: dict[str, bytes]) -> bytes:
    """The wheel's list of files, with digests and sizes of what was changed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in csv.reader(io.StringIO(record.decode())):
        if row[0] in changed:
            data = changed[row[0]]
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            row = [row[0], f"sha256={digest}", str(len(data))]
        writer.writerow(row)
    return out.getvalue().encode()
