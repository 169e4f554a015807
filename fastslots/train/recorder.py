"""What a run leaves in its folder and tells people while it goes: numbers, pictures, pages, weights and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

from fastslots.config.run import TrainConfig
from fastslots.data.sources import Source, same_images
from fastslots.errors import UserError
from fastslots.evaluation.grids import SlotPictures
from fastslots.files import write_atomic
from fastslots.models.vae import Build
from fastslots.ops import backends
from fastslots.records import describe
from fastslots.report.pictures import encoded
from fastslots.report.write import write_explorer, write_report
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import MetricsLog, without_nan
from fastslots.runs.machine import PACKAGES, Meter, nvidia_driver, versions
from fastslots.runs.progress import ProgressView, Silent
from fastslots.runs.repeat import Repetition, changes
from fastslots.runs.trackers import open_trackers
from fastslots.runs.view import open_progress
from fastslots.train.checkpoint import Checkpoint, Writer, save_checkpoint
from fastslots.train.schedule import late_ramps


class Recorder:
    """Writes a run's folder and speaks to whoever watches; it computes nothing.

    A run outlives a full disk and a tracker that has gone: what is lost is said once for each reason. Of several
    processes the first one writes and speaks; on the others every method but ``non_finite`` does nothing.

    Args:
        folder: the run's, made already.
        step: the last step that is done; lines of the logs after it are cut.
        stream: where progress goes; None: stderr.
        first: whether this process is the one that writes.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        step: int,
        device: torch.device,
        stream: TextIO | None,
        first: bool,
    ):
        self._folder, self._config, self._device, self._first = folder, config, device, first
        self._warned: set[str] = set()
        self._log: MetricsLog | Silent = Silent()
        self._progress: ProgressView = Silent()
        if first:
            names, facts = config.trackers(), dataclasses.asdict(config)
            self._log = MetricsLog(folder, step, open_trackers(names, folder, step, facts))
            self._progress = open_progress(config.steps, config.log_every, step, stream, folder.metrics)
        self._repetition: Repetition | None = None
        self._meter = Meter(device, self._log.energy_wh)
        self._writer = Writer(self.say)

    def close(self) -> None:
        """Wait for what is being written, then close everything, also where one of them fails."""
        if self._repetition:
            self._repetition.end()
        with contextlib.ExitStack() as stack:
            # from the last to the first: what is being written may have something to say, and so may a tracker
            stack.callback(self._progress.close)
            stack.callback(self._log.close, self.say)
            stack.callback(self._writer.close)

    def say(self, text: str) -> None:
        """A line that is to stay."""
        self._progress.say(text)

    def note(self, text: str) -> None:
        """What is being done between steps."""
        self._progress.note(text)

    def announce(
        self, source: Source, model: torch.nn.Module, step: int, processes: int, earlier: dict[str, Any], steps: str
    ) -> None:
        """Store what the run is made with, and say in a few lines what is about to happen.

        earlier: the configuration with which a run that goes on was run before. steps: how a GPU does them, if any.
        """
        if not self._first:
            return
        config, say = self._config, self.say
        folder = self._folder
        before = folder.described_data()
        made_before = folder.read_json(folder.machine) if step else {}
        digest = made_before.get("digest", "")
        if step and before and not same_images(before, source.description):
            say(f"warning   other images than before from here on: the run had {before}")
        elif digest and source.digest and digest != source.digest:
            say(f"warning   other images than before from here on: their fingerprint was {digest}, is {source.digest}")
        self._store(folder.data, f"{source.description}\n".encode(errors="backslashreplace"))
        facts = self._meter.facts()
        warnings = [*source.warnings, *late_ramps(config)]
        if config.num_slots == 1:
            warnings.append("num_slots 1: JIS is not defined for one slot, and left out; two slots or more can share")
        if config.device == "auto" and self._device.type == "cpu" and nvidia_driver() is not None:
            warnings.append("an NVIDIA GPU is here, but torch cannot use it: `fastslots doctor` says why")
        chain = max(config.decoder_layers, len(config.output_hidden) + 1)
        call = describe("decoder_loss", [torch.empty(1, device=self._device)], chain)
        name = backends.select(call, "auto")  # an explanation would import every backend
        made_with: dict[str, Any] = {"versions": versions(PACKAGES), "digest": source.digest, "warnings": warnings}
        made_with |= {"step": steps} if steps else {}
        made_with |= {"processes": processes, "kernels": f"{name} {os.environ.get('FASTSLOTS_ISA', '')}".strip()}
        if step:
            changed = [*changes(earlier, json.loads(config.to_json())), *made_otherwise(made_before, facts | made_with)]
            self._repetition = Repetition(self._log.cut, changed, say)
        self._store(folder.machine, json.dumps(facts | made_with).encode())
        count = sum(p.numel() for p in model.parameters())
        say(f"run       {folder.path}" + (f" (resumed at step {step})" if step else ""))
        say(f"data      {source.description}")
        for warning in warnings:
            say(f"warning   {warning}")
        say(f"model     {count:,} parameters, K {config.num_slots}, D {config.slot_dim}, {config.resolution}²")
        where = f"{self._device}" if processes == 1 else f"{processes} processes on {self._device.type}"
        how = f"{config.optimizer}, {config.precision}, {where}"
        say(f"training  {config.steps:,} steps of {config.batch_size} images, {how}")
        say(f"kernels   {name if name != 'reference' else backends.explain_call(call)}")
        if steps:
            say(f"step      {steps}")
        say(f"energy    {facts['energy']}")

    def trained(self, step: int, values: dict[str, float]) -> None:
        """The values of a training step."""
        self._write({"step": step, **values})
        if step % self._config.log_every == 0:
            self._or_warn(lambda: self._log.cost({"step": step, **self._meter.read()}))
        self._progress.update(step, values)

    def evaluated(
        self, step: int, scores: dict[str, Any], of_images: Mapping[str, Sequence[float]], pictures: SlotPictures
    ) -> None:
        """The scores of an evaluation, those of single images, and its pictures where there are any; then the page."""
        if not self._first:
            return
        self._write({"step": step, "eval": "val", **scores})
        self._progress.evaluated(step, scores, pictures.tiles)
        if pictures.tiles:
            self.pictures(step, pictures)
        if of_images:
            short = {name: [round(score, 4) for score in scores] for name, scores in of_images.items()}
            self._store(self._folder.scores, json.dumps({"step": step, **short}).encode())
        self._or_warn(self.page)

    def pictures(self, step: int, pictures: SlotPictures) -> None:
        """The grid of an evaluation, in the run's folder and to trackers that take pictures."""
        self._or_warn(lambda: self._grid(step, pictures.grid()))

    def _grid(self, step: int, grid: Image.Image) -> None:
        self._store(self._folder.grid(step), encoded(grid, "PNG", optimize=True))
        self._or_warn(lambda: self._log.picture("val/slots", grid, step))

    def has_pictures(self) -> bool:
        """Whether an evaluation has left a grid."""
        return any(self._folder.images.iterdir())

    def best(self, weights: bytes) -> None:
        """Write the best weights so far while the next steps run."""
        if self._first:
            self._writer.submit(lambda: write_atomic(self._folder.best_weights, weights))

    def checkpoint(self, checkpoint: Checkpoint, weights: bytes) -> None:
        """Write what a resume needs, and the weights of the same step, while the next steps run."""

        def write() -> None:
            if not self._folder.path.is_dir():
                self.say(f"warning   {self._folder.path} was removed: it is made anew, from what is in memory")
                self._folder.remake(f"{self._config.to_json()}\n")
            with contextlib.suppress(OSError, UserError):  # of a full disk, which what follows reports
                self._log.sync()
            save_checkpoint(self._folder, checkpoint, self._config.keep_checkpoints)
            write_atomic(self._folder.last_weights, weights)

        if self._first:
            self._writer.submit(write)

    def finish(self) -> None:
        """Wait until weights and checkpoints are on the disk; UserError where the newest was not written."""
        self._writer.finish()

    def page(self) -> None:
        """Write report.html as of now. UserError where it cannot be written."""
        write_report([self._folder.path])

    def explore(self, source: Source, build: Build | None = None) -> None:
        """The page once more, with pictures of the best weights, which are on the disk by now.

        build: what they are loaded into, where the configuration does not say."""

        def progress(images: int, total: int) -> None:
            self.note(f"slot explorer: {images} of {total} images decoded")

        def write() -> None:
            reason = write_explorer(self._folder, lambda: source.splits["val"], self._device, progress, build)
            if reason:
                self.say(f"no slot explorer: {reason}")
            else:
                self.page()

        self._or_warn(write)

    def unexplored(self) -> None:
        """Say what makes the pictures that a signal has cut short."""
        self.say(f"no slot explorer yet: fastslots report {self._folder.path} makes it")

    def non_finite(self, path: Path, batch: bytes, values: dict[str, Any]) -> None:
        """Keep the batch of a step that went wrong and the step's values, which say why."""
        self._store(path, batch)
        self._write(values)

    def _store(self, path: Path, data: bytes) -> None:
        self._or_warn(lambda: write_atomic(path, data))

    def _write(self, values: dict[str, object]) -> None:
        self._or_warn(lambda: self._log.write(values))
        if self._repetition:
            self._repetition.see(without_nan(values))

    def _or_warn(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # a picture or a page is no reason to end a run
            if str(error) not in self._warned:
                self._warned.add(str(error))
                mend = ": free space" if isinstance(error, OSError) else ""
                reason = error if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
                self.say(f"warning   {reason}{mend}; training goes on")


def made_otherwise(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two machine.json, in words: packages, processor and threads, processes, kernels, data."""
    packages = before.get("versions")
    versions_differ = changes(packages, now["versions"]) if isinstance(packages, dict) else []
    others: dict[str, Any] = {
        name: before[name] for name in ("machine", "processes", "kernels", "step", "digest") if name in before
    }
    return [*versions_differ, *changes(others, now)]
