"""A flag for every field of a configuration, and a help that fits two screens.

argparse makes the flags out of ``TrainConfig``'s fields: CONTRIBUTING.md says why no library does.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastslots.config.model import SlotVAEConfig
from fastslots.config.presets import preset_names
from fastslots.config.run import TrainConfig
from fastslots.config.spans import Span, checked_span
from fastslots.errors import UserError

DEFAULT_PRESET = "sprites-mini"
COMMON = {
    "data": ("data", "max_objects"),
    "model": ("resolution", "num_slots", "slot_dim", "model"),
    "loss": ("alpha", "beta"),
    "training": ("steps", "batch_size", "lr", "precision", "device", "threads", "seed"),
    "evaluation and records": ("eval_every", "checkpoint_every", "log_to"),
}
"""By the heading of the help: fields that `--help` describes, in this order."""
RARE = {
    "data": (
        "mix", "mix_share", "objects", "augment", "augment_crop", "augment_colour", "holdout", "on_bad_record",
        "ignore_label",
    ),
    "loss": ("sigma", "jacobian_weight", "jacobian_pixels"),
    "evaluation and records": ("eval_images", "eval_batch", "keep_checkpoints", "log_every", "tensorboard"),
}  # fmt: skip
"""Others that have a heading of their own; the rest stand under "model" or "training", whichever they are fields of."""
SHOWN = 24  # characters of a value in the help
WIDEST, HELP_AT = 100, 26  # columns of the help; where the text of a flag begins

Converter = Callable[[str], Any]
"""The text of a flag -> its value."""


def add_fields(
    parser: argparse.ArgumentParser, each: Callable[[str, Converter], Converter] = lambda field_type, convert: convert
) -> None:
    """A flag for every field of TrainConfig, --batch_size and --batch-size alike; absent unless given.

    each: (type of the field, its text -> value) -> what the flag takes, one value or something made of them.
    """
    for heading, names in headings().items():
        group = parser.add_argument_group(heading)
        for name in names:
            field = TrainConfig.__dataclass_fields__[name]
            action = group.add_argument(
                *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
                dest=f"field_{name}",
                default=argparse.SUPPRESS,
                type=each(str(field.type), _converter(field)),
                metavar="LENGTH" if field.type == "int | str" else str(field.type).split("[")[0].upper(),
                help=f"{field.metadata['help'].replace('%', '%%')} [%(shown)s]",
                nargs="?" if field.type == "bool" else None,
                const="true" if field.type == "bool" else None,  # a text, so that argparse converts it
            )
            vars(action).update(shown=_shown(field.default), rare=name not in COMMON[heading])


def headings() -> dict[str, list[str]]:
    """Heading -> fields under it, those that are common first; every field that is a flag stands under one."""
    own = {field.name for field in dataclasses.fields(SlotVAEConfig)}
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "preset_name"]
    named = {name: heading for table in (COMMON, RARE) for heading, under in table.items() for name in under}
    places = {name: named.get(name, "model" if name in own else "training") for name in names}
    return {
        heading: [*common, *(name for name in names if places[name] == heading and name not in common)]
        for heading, common in COMMON.items()
    }


def add_help(parser: argparse.ArgumentParser) -> None:
    """--help and --help-all, of a parser without the usual one."""
    parser.add_argument("-h", "--help", action=Help, everything=False, help="show this help and end")
    parser.add_argument("--help-all", action=Help, everything=True, help="the same, with every field described")


class Help(argparse.Action):
    """Print the help with the values of the chosen preset; rare fields by name alone unless ``everything``."""

    def __init__(self, option_strings: Sequence[str], dest: str, everything: bool, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **options)
        self.everything = everything

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> NoReturn:
        named = getattr(namespace, "preset", None)
        preset = named if named in preset_names() else DEFAULT_PRESET
        values = TrainConfig.preset(preset)
        for action in parser._actions:
            if action.dest.startswith("field_"):
                vars(action)["shown"] = _shown(getattr(values, action.dest.removeprefix("field_")))
        print(help_text(parser, preset, self.everything), end="")
        parser.exit()


def help_text(parser: argparse.ArgumentParser, preset: str, everything: bool) -> str:
    """A line a flag, rare fields by name; or all of what is known of each."""
    width = min(shutil.get_terminal_size().columns, WIDEST) - 1
    values = f"A flag beats the preset and --config. In brackets: values of preset {preset}"
    more = "." if everything else "; --help-all has more."
    lines = [f"usage: {parser.usage}", "", *textwrap.wrap(f"{parser.description} {values}{more}", width), ""]
    for group in parser._action_groups:
        if group.title in COMMON:
            lines += ["", f"{group.title}:"] if everything else [f"{group.title}:"]
        shown = [a for a in group._group_actions if everything or not getattr(a, "rare", False)]
        for action in shown:
            flag, text = f"  {_invocation(action)}", (str(action.help) % vars(action)).removesuffix(" []")
            room = width - HELP_AT
            whole = everything or not action.option_strings  # the presets: all of them are to be seen
            texts = textwrap.wrap(text, room, break_on_hyphens=False) if whole else [_in_a_line(text, room)]
            if len(flag) > HELP_AT - 2:
                lines.append(flag)
                flag = ""
            lines += [f"{head:<{HELP_AT}}{line}" for head, line in zip([flag, *[""] * len(texts)], texts, strict=False)]
        if rare := [action.option_strings[0] for action in group._group_actions if action not in shown]:
            lines += textwrap.wrap(
                " ".join(["also", *rare]), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
    return "\n".join(lines) + "\n"


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest.upper())
    takes = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(_spellings(action)) + takes


def _in_a_line(text: str, room: int) -> str:
    """A help that is too long ends after a clause, or with dots; what stands in brackets at its end stays."""
    if len(text) <= room:
        return text
    said, bracket, value = text.rpartition(" [") if text.endswith("]") else (text, "", "")
    said = said.split("; ")[0]
    left = room - len(bracket + value)
    return (said if len(said) <= left else textwrap.shorten(said, left, placeholder=" ...")) + bracket + value


def _spellings(action: argparse.Action) -> list[str]:
    """Without those that differ from another in dashes for underscores alone."""
    kept: dict[str, str] = {}
    for option in action.option_strings:
        kept.setdefault(option.replace("-", "_"), option)
    return list(kept.values())


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _converter(field: dataclasses.Field[Any]) -> Converter:
    """Text -> value; an error names the flag (argparse adds it) and what was expected."""

    def whole(text: str) -> int:
        try:
            return int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None

    def truth(text: str) -> bool:
        if text in preset_names():
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false: put the preset before the flags")
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes")

    def widths(text: str) -> tuple[int, ...]:
        return tuple(whole(part) for part in text.split(",") if part)

    def span(text: str) -> Span:
        try:
            return checked_span(field.name, text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {"int": whole, "int | str": span, "float": number, "bool": truth, "tuple[int, ...]": widths}.get(
        str(field.type), str
    )
