"""Trained models by name: those that ship with the package, a folder's, or a repository's on the Hugging Face Hub.

A model that ships is a small run folder, ``runs/shipped/NAME``: config.json (the run's fields), model.safetensors
(weights; its metadata holds the model's configuration and the scores) and seeds.json (the scores of this seed and of
others). ``scripts/make_shipped.py`` makes it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from fastslots.errors import UserError, first_line
from fastslots.runs.folder import RunFolder

SHIPPED = Path(__file__).parent / "shipped"
PREFIX = "shipped:"
"""Before a name: the model that ships, whatever folder of that name there is."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def shipped_names() -> list[str]:
    return sorted(path.name for path in SHIPPED.iterdir() if RunFolder(path).last_weights.is_file())


def run_folder(name: str | Path) -> Path:
    """The folder that a command's RUN means: a run's folder, or the model of that name that ships.

    A run's folder comes first, as it did before models shipped (``hidden_by`` then says so); ``shipped:NAME`` is always
    the model that ships. UserError for an unknown name behind that prefix, and where there is neither.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return _shipped(text.removeprefix(PREFIX))
    if text in shipped_names() and not RunFolder(Path(text)).config.is_file():
        return _shipped(text)
    try:
        RunFolder(Path(name)).check()
    except UserError as error:
        raise UserError(f"{error}, or a model that ships: {', '.join(shipped_names())}") from None
    return Path(name)


def is_shipped(folder: Path) -> bool:
    """Whether ``run_folder`` has given a model that ships."""
    return folder.parent == SHIPPED


def hidden_by(folder: Path) -> str:
    """One line where a run's folder has the name of a model that ships, and was taken; "" otherwise."""
    if is_shipped(folder) or str(folder) not in shipped_names():
        return ""
    return f"{folder} is the run in that folder; the model of this name that ships is {PREFIX}{folder}"


def weights_file(name: str | Path, weights: str = "best") -> Path:
    """The weights file that ``SlotVAE.from_pretrained`` means by a name; where the arguments are described."""
    text, path = str(name), Path(name)
    if text.startswith(PREFIX):
        return RunFolder(_shipped(text.removeprefix(PREFIX))).last_weights
    if path.is_file():
        return path
    if path.is_dir():
        if text in shipped_names():
            raise UserError(f"{text} is both a folder here and a model that ships: write ./{text} or {PREFIX}{text}")
        folder = RunFolder(path)
        if folder.config.is_file() or not folder.last_weights.is_file():
            return folder.weights(weights)
        return folder.last_weights  # what ``save_pretrained`` wrote, or a copy of a repository
    if text in shipped_names():
        return RunFolder(_shipped(text)).last_weights
    if isinstance(name, str) and _REPOSITORY.fullmatch(name):
        return _from_hub(name)
    raise UserError(
        f"{text} is neither a folder, nor a model that ships ({', '.join(shipped_names())}), nor OWNER/NAME on the Hub"
    )


def _shipped(name: str) -> Path:
    if name not in shipped_names():
        raise UserError(f"no model {name!r} ships: choose one of {', '.join(shipped_names())}")
    return SHIPPED / name


def _from_hub(repository: str) -> Path:
    """model.safetensors of a repository, through the Hub's own client and its cache."""
    if not importlib.util.find_spec("huggingface_hub"):
        raise UserError(
            f"{repository} is no folder here; to fetch it from the Hugging Face Hub: pip install 'fastslots[hub]'"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # the client raises its own types, those of its HTTP library and OSError
        raise UserError(f"{repository} cannot be fetched from the Hugging Face Hub ({first_line(error)})") from None
