"""What a run's folder says of code that is not ours: the model's, and losses and metrics that were given to ``fit``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastslots.config.code import Code, check_trusted, load_code, name_of
from fastslots.errors import UserError
from fastslots.files import read_file, write_atomic
from fastslots.runs.folder import RunFolder


@dataclass(frozen=True)
class OwnCode:
    """Names are package.module:function, "" where Python code gave something that has no such name (a lambda, say)."""

    model: Code = field(default_factory=Code)
    losses: Mapping[str, tuple[float, str]] = field(default_factory=dict)  # name -> (weight, its code)
    metrics: Mapping[str, str] = field(default_factory=dict)  # name -> its code

    @classmethod
    def of(
        cls,
        model: Code,
        losses: Mapping[str, tuple[float, Callable[..., Any]]],
        metrics: Mapping[str, Callable[..., Any]],
    ) -> OwnCode:
        weighted = {name: (float(weight), name_of(function)) for name, (weight, function) in losses.items()}
        return cls(model, weighted, {name: name_of(function) for name, function in metrics.items()})

    @classmethod
    def read(cls, folder: RunFolder) -> OwnCode:
        """Of a run's folder; empty where it has none. UserError where the file is damaged."""
        path = folder.code
        try:
            values = json.loads(read_file(path)) if path.is_file() else {}
            losses = {name: (float(weight), str(code)) for name, (weight, code) in values.get("losses", {}).items()}
            metrics = {name: str(code) for name, code in values.get("metrics", {}).items()}
            return cls(Code(**values.get("model", {})), losses, metrics)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it, and name the model with --model") from None

    def write(self, folder: RunFolder) -> None:
        """Into a run's folder; no file where all code is ours. UserError where it cannot be written or removed."""
        if self == OwnCode():
            try:
                folder.code.unlink(missing_ok=True)
            except OSError as error:
                reason = f"{folder.code}, of code that this run no longer has, cannot be removed ({error.strerror})"
                raise UserError(f"{reason}: remove it") from None
        else:
            write_atomic(folder.code, json.dumps(asdict(self), indent=1).encode() + b"\n")

    def names(self) -> list[str]:
        """Every name of code in it."""
        named = (self.model.name, *(code for _, code in self.losses.values()), *self.metrics.values())
        return [name for name in named if name]

    def load_losses(self, folder: RunFolder) -> dict[str, tuple[float, Callable[..., Any]]]:
        """UserError where code is not trusted, or has no name."""
        for name, (_, code) in self.losses.items():
            if not code:
                raise UserError(
                    f"{folder.path} has a loss {name!r} of Python code: resume it there, by fit(losses=...)"
                )
            check_trusted(code, folder.code)
        return {name: (weight, load_code(code, self.model.folder)) for name, (weight, code) in self.losses.items()}

    def load_metrics(self, folder: RunFolder) -> tuple[dict[str, Callable[..., Any]], list[str]]:
        """Metrics that can be computed, and what is said of the others."""
        metrics, reasons = {}, []
        for name, code in self.metrics.items():
            try:
                if not code:
                    raise UserError("it was given to fit in Python, without a name that could be imported")
                check_trusted(code, folder.code)
                metrics[name] = load_code(code, self.model.folder)
            except UserError as error:
                reasons.append(f"metric {name} is left out: {error}")
        return metrics, reasons
