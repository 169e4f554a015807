"""What defines a run: the model's configuration and how it is trained. Every field is a flag of ``fastslots train``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastslots.config.code import GIVEN, check_name
from fastslots.config.model import SlotVAEConfig, option
from fastslots.config.spans import checked_span, in_steps
from fastslots.errors import UserError, first_line
from fastslots.files import read_file

if TYPE_CHECKING:
    import torch

SCHEDULES = ("constant", "cosine", "paper", "paper-clevrtex")
BUILTIN = ("sprites", "sprites-textured", "scenes")
"""Names that ``data`` takes for data that are made, not read (``fastslots.data.builtin``)."""
SCENE_OBJECTS = (3, 6)
"""Of built-in rendered scenes, as in CLEVR6."""
MOST_OBJECTS = 10
AUGMENTATIONS = ("mirror", "crop", "colour")
TRACKERS = ("tensorboard", "wandb", "trackio")
SPAN = "steps, or a share of the run such as 8%"
LATER_FIELDS = ("queries", "cnn_kernel", "plateau_end", "decay_steps", "model", "generator", "ignore_label")
"""Fields that runs of earlier versions did not have. Where a run's file lacks one, the run had its default, whatever
the preset has by now, or what ``BEFORE`` says."""
BEFORE = {"generator": "torch"}
OPTIMIZERS = ("adam", "adamw", "muon")
"""Those of the presets: to know them takes no import of torch, a second that a help or a wrong flag would wait for."""
MOST_THREADS = 1024  # torch takes any number, and dies where the system makes no more
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SlotVAEConfig):
    """A run: everything of ``SlotVAEConfig``, and how it is trained.

    Raises UserError (a ValueError) that names the field, its value and what is expected.
    """

    preset_name: str = option("the preset that the run started from (a label)", "")
    model: str = option("a model of your own: package.module:build, where build(config) gives a SlotVAE", "")
    data: str = option(f"built-in data ({', '.join(BUILTIN)}), or the path of a data set", "sprites")
    mix: str = option("further data, built-in or a path, that are mixed into training alone; empty: none", "")
    mix_share: float = option("their share of the training images", 0.67)
    max_objects: int = option("drop scenes with more objects than this; 0 keeps all", 0)
    objects: str = option(
        "objects of a built-in scene, A-B such as 2-3; empty: 2 to one fewer than num_slots, at most 4 (scenes: 3-6)",
        "",
    )
    holdout: str = option(
        "combination of an object's factors that no image of the run shows, e.g. shape=square,hue=0.5:0.75", ""
    )
    augment: str = option(
        f"changes of training images, with commas between: {', '.join(AUGMENTATIONS)}; empty: none", ""
    )
    augment_crop: float = option("least side of augment's crops, as a share of the image's", 0.7)
    augment_colour: float = option("how far augment's colours go, from 0 to 1 (any hue)", 0.2)
    ignore_label: int = option("mask label of pixels that are not scored, 255 say; -1: as the data say", -1)
    on_bad_record: str = option("damaged records of the data: 'stop' at the first, or 'skip' and count them", "stop")
    steps: int = option("training steps", 500_000)
    batch_size: int = option("images a step, over all processes", 32)
    accumulate: int = option("parts in which a step's batch is computed, to save memory", 1)
    optimizer: str = option("a class of torch.optim by name (adam, adamw, ...), or muon (with AdamW beside it)", "adam")
    lr: float = option("learning rate at its highest", 5e-4)
    weight_decay: float = option("weight decay of the optimiser", 0.0)
    schedule: str = option(f"of the learning rate: {', '.join(SCHEDULES)}", "paper")
    warmup: int | str = option(f"linear warm-up of the rate: {SPAN}", 2_500)
    plateau_end: int | str = option(f"where the rate of schedule paper falls to a fifth: {SPAN}", 30_000)
    decay_steps: int | str = option(f"over what the rate of the paper's schedules falls to a tenth: {SPAN}", 500_000)
    alpha_start: int | str = option(f"until when alpha is held at alpha_floor of its value: {SPAN}", 0)
    alpha_warmup: int | str = option(f"over what alpha then rises to its full value: {SPAN}", 25_000)
    alpha_floor: float = option("share of alpha that the ramp starts from", 0.0)
    beta_start: int | str = option(f"until when beta is 0: {SPAN}", 0)
    beta_warmup: int | str = option(f"over what beta then rises to its full value (0: at once): {SPAN}", 0)
    grad_clip: float = option("largest norm of all gradients together; 0: no clipping", 0.0)
    pixels_per_step: int = option("pixels of each image that a step decodes, drawn with replacement; 0: all", 0)
    pixel_sampling: str = option(
        "uniform; foreground: half of them where the image differs from its border; or edges: half of them where it "
        "changes, and the others as foreground does",
        "uniform",
    )
    precision: str = option(
        f"of matrix products: {', '.join(PRECISIONS)}; auto: bf16 on a GPU that has it, else fp32", "auto"
    )
    compile: bool = option("torch.compile the encoder (the decoder runs in tiles of its own)", False)
    device: str = option("auto (a GPU where there is one), cpu, cuda, cuda:1, ...", "auto")
    threads: int = option("threads of torch on a CPU; 0: its default", 0)
    seed: int = option("of the initial weights, batches, noise and pixel subsets", 0)
    generator: str = option(
        "of noise and pixel subsets: 'counter' (the same numbers on every device) or 'torch' (runs before 0.2)",
        "counter",
    )
    eval_every: int = option("steps between evaluations; 0: at the end alone", 10_000)
    eval_images: int = option("held-out images of an evaluation; 0: all of the split", 500)
    eval_batch: int = option("images that an evaluation computes at once", 10)
    checkpoint_every: int = option("steps between checkpoints; 0: at the end alone", 5_000)
    keep_checkpoints: int = option("checkpoints that are kept besides the best weights", 2)
    log_every: int = option("steps between progress lines where the output is no terminal (at least one in 10 s)", 100)
    init_from: str = option("a run directory or weights file to start from", "")
    tensorboard: bool = option("also write TensorBoard events: the same as --log_to tensorboard", False)
    log_to: str = option(f"also log to, with commas between: {', '.join(TRACKERS)} (an extra each)", "")

    def _check(self) -> None:
        super()._check()
        check_name("model", self.model)
        self._choice("schedule", SCHEDULES)
        self._choice("precision", PRECISIONS)
        self._choice("on_bad_record", ("stop", "skip"))
        self._choice("pixel_sampling", ("uniform", "foreground", "edges"))
        self._choice("generator", ("counter", "torch"))
        for name in self.trackers():
            if name not in TRACKERS:
                raise UserError(f"log_to must name {', '.join(TRACKERS)}, got {name!r}")
        self.builtin_objects()
        self._check_augmentations()
        if not 0 < self.mix_share < 1:
            raise UserError(f"mix_share must be above 0 and below 1, got {self.mix_share}")
        if self.mix and self.input != "pixels":
            raise UserError("mix adds pictures, and this model reads features: leave it out")
        if self.threads > MOST_THREADS:
            raise UserError(f"threads must be at most {MOST_THREADS}, got {self.threads}: 0 is one a core")
        self._at_least(1, "steps", "batch_size", "accumulate", "eval_batch", "keep_checkpoints", "log_every")
        for f in dataclasses.fields(self):
            if f.type == "int | str":
                object.__setattr__(self, f.name, checked_span(f.name, getattr(self, f.name)))
        if in_steps(self.decay_steps, self.steps) == 0 and self.schedule.startswith("paper"):
            raise UserError(
                f"decay_steps must be at least one step for schedule {self.schedule}, got {self.decay_steps}"
            )
        self._at_least(
            0, "max_objects", "alpha_floor", "grad_clip", "pixels_per_step", "threads", "eval_every", "eval_images"
        )
        self._at_least(0, "checkpoint_every", "weight_decay", "seed", "lr")
        self._at_least(-1, "ignore_label")
        if self.lr == 0:
            raise UserError("lr must be above 0, got 0")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.pixels_per_step > self.resolution**2:
            pixels = self.resolution**2
            raise UserError(
                f"pixels_per_step {self.pixels_per_step} is more than the image has ({pixels}): 0 means all"
            )
        if self.optimizer not in OPTIMIZERS and not optimizer_class(self.optimizer):
            raise UserError(
                f"optimizer must be muon or a class of torch.optim (adam, adamw, sgd, ...), got {self.optimizer!r}"
            )

    def _check_augmentations(self) -> None:
        for name in self.augmentations():
            if name not in AUGMENTATIONS:
                raise UserError(f"augment must name {', '.join(AUGMENTATIONS)}, got {name!r}")
        if self.augmentations() and self.input != "pixels":
            raise UserError("augment changes pictures, and this model reads features: leave it out")
        if "colour" in self.augmentations() and self.channels != 3:
            raise UserError(f"augment colour needs images of 3 channels, got channels {self.channels}")
        if not 0 < self.augment_crop <= 1:
            raise UserError(f"augment_crop must be above 0 and at most 1, got {self.augment_crop}")
        if not 0 <= self.augment_colour <= 1:
            raise UserError(f"augment_colour must be from 0 to 1, got {self.augment_colour}")

    def builtin_objects(self) -> tuple[int, int]:
        """Least and most objects of a built-in scene. UserError for an ``objects`` that names no two such numbers."""
        if not self.objects:
            return SCENE_OBJECTS if self.data == "scenes" else (2, max(2, min(self.num_slots - 1, 4)))
        if self.data and self.data not in BUILTIN:
            raise UserError(f"objects {self.objects} is of built-in data, and data is {self.data}: leave it out")
        least, dash, most = self.objects.partition("-")
        if not (dash and least.isascii() and least.isdigit() and most.isascii() and most.isdigit()):
            raise UserError(f"objects must be A-B, such as 2-3, got {self.objects!r}")
        if not 1 <= int(least) <= int(most) <= MOST_OBJECTS:
            raise UserError(f"objects must be A-B with 1 <= A <= B <= {MOST_OBJECTS}, got {self.objects!r}")
        return int(least), int(most)

    def augmentations(self) -> tuple[str, ...]:
        """Names of ``augment``, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.augment.split(",") if name.strip()))

    def in_steps(self, field: str) -> int:
        """A schedule's length in steps, where the field may give it as a share of the run."""
        return in_steps(getattr(self, field), self.steps)

    def resolved(self) -> TrainConfig:
        """The same with local paths that hold in every working directory, and the precision that this device takes."""
        init_from = str(Path(self.init_from).absolute()) if self.init_from else ""
        data, mix = _absolute(self.data), _absolute(self.mix)
        return dataclasses.replace(self, data=data, mix=mix, init_from=init_from, precision=self._precision())

    def _precision(self) -> str:
        if self.precision != "auto":
            return self.precision
        import torch

        has_bf16 = self.torch_device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"

    def torch_device(self) -> torch.device:
        """UserError where this machine has no such device; a configuration as such is good on any machine."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {self.device!r} cannot be used ({first_line(error)}): try --device cpu") from None
        return device

    def trackers(self) -> list[str]:
        """Names of ``log_to``, each once."""
        names = [name.strip() for name in self.log_to.split(",") if name.strip()]
        return list(dict.fromkeys((["tensorboard"] if self.tensorboard else []) + names))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def _absolute(data: str) -> str:
    """A data set's local path from the root; what is no such path as it is."""
    named = data in ("", *BUILTIN) or "://" in data or data.startswith(GIVEN)
    return data if named else str(Path(data).absolute())


def optimizer_class(name: str) -> Any:
    """A class of torch.optim by its lower-case name, or None."""
    import torch

    found = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}.get(
        name.lower()
    )
    return found if found and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer else None


MOST_BYTES = 1 << 20
"""Of a configuration: one that is a link to a device would be read without end."""


def read_config(
    path: str | Path, cls: type[SlotVAEConfig] = TrainConfig, preset: str | None = None, **overrides: object
) -> Any:
    """A run's ``config.json`` (or any JSON object of fields), as a ``cls``.

    What it leaves out is the preset's, or where none is named has its default; so have, in the file of a run, the
    ``LATER_FIELDS``. Raises UserError where it names fields that no run has, or another preset.
    """
    path = Path(path)
    try:
        values = json.loads(read_file(path, MOST_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a run's config.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): name a run's config.json") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object of fields, got a {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(TrainConfig)})
    if unknown:
        raise UserError(f"{path} has unknown fields: {', '.join(unknown)}")
    if "preset_name" in values:  # a run wrote it, with all fields of its time
        later = {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.name in LATER_FIELDS}
        values = later | BEFORE | values
    given = {key: value for key, value in values.items() if key in known} | overrides
    if not preset:
        return cls(**given)
    if (of := values.get("preset_name") or preset) != preset:
        raise UserError(f"{path} is of preset {of!r}, not {preset!r}: leave the preset out")
    return cls.preset(preset, **given)
