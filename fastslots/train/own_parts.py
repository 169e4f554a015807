"""Models, losses and metrics of one's own at the start of a run: built, tried once, compared with what it had."""

from __future__ import annotations

from pathlib import Path

import torch

from fastslots.config.code import GIVEN, Code, changed, code_of, load_code, trust
from fastslots.config.run import TrainConfig
from fastslots.errors import UserError
from fastslots.models import SlotVAE
from fastslots.models.vae import build_model
from fastslots.runs.folder import RunFolder
from fastslots.runs.own_code import OwnCode
from fastslots.runs.weights import read_weights


def described(model: SlotVAE) -> bool:
    """Whether the model's configuration alone describes it: the same modules, with weights of the same shapes."""
    with torch.device("meta"):
        plain = SlotVAE(model.config)

    def parts(of: SlotVAE) -> tuple[list[object], list[object]]:
        modules: list[object] = [(name, type(module)) for name, module in of.named_modules()]
        return modules, [(name, value.shape) for name, value in of.state_dict().items()]

    return parts(model) == parts(plain)


def initial_model(config: TrainConfig, given: SlotVAE | None = None, folder: str = "") -> SlotVAE:
    """``given``, or a fresh model; with the weights of ``init_from`` where they fit.

    folder: where the code of ``config.model`` was before. Importing it is trusted: the caller has asked for it.
    """
    named = bool(config.model) and not config.model.startswith(GIVEN)
    if named:
        trust(config.model)
    if given is not None:
        model = given
        if named:
            load_code(config.model, folder)
        model.code = code_of(config.model) if named else Code(config.model)
    elif config.model and not named:
        what = config.model.removeprefix(GIVEN)
        raise UserError(f"the run's model was {what}: give it to fit again, or name what builds it with --model")
    else:
        model = build_model(config, config.model, folder)
    if config.init_from:
        path = Path(config.init_from)
        _, _, start = read_weights(RunFolder(path).weights("best") if path.is_dir() else path)
        try:
            model.load_state_dict(start)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"init_from {path}: its weights do not fit this model ({reason})") from None
    return model


def compare(stored: OwnCode, now: OwnCode, folder: Path) -> list[str]:
    """What is said of a run that goes on with other code than it had. UserError where a loss is missing."""
    missing = sorted(stored.losses.keys() - now.losses.keys())
    if missing:
        raise UserError(
            f"{folder} was trained with the losses {', '.join(missing)}: give them to fit again (losses=...), or add "
            f"--trust-code where their code can be imported"
        )
    said = []
    if stored.model.name == now.model.name and stored.model.digest != now.model.digest:
        said.append(changed(now.model))
    for name, (weight, _) in now.losses.items():
        before = stored.losses.get(name, (0.0, ""))[0]
        if before != weight:
            said.append(f"the loss {name} has weight {weight:g} from here on; it had {before:g}")
    left_out = sorted(stored.metrics.keys() - now.metrics.keys())
    if left_out:
        said.append(f"the metrics {', '.join(left_out)} are not computed from here on: they were not given again")
    return said
