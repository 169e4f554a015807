"""Many processes that train as one: ``torchrun --nproc-per-node N -m fastslots train ...``.

Every process computes a contiguous share of each batch (shares may differ by one image). A loss that is a mean over
images makes the whole batch's gradient the sum of the shares' gradients, each weighted by its size; so one all-reduce
of a flat buffer after backward gives every process what a single one would have, within rounding. (A wrapper that
reduces inside ``forward`` would see nothing: the tiled loss makes its gradients elsewhere.) The buffer also carries
the losses and whether a process was asked to stop, so all stop after the same step.

One process is the same code with ``size`` 1, where nothing below costs anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastslots.errors import UserError, first_line

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another that is alive but silent; one that has ended is noticed at once."""
ROLL_CALL = 2.0  # seconds in which the survivors of a lost process answer,
LISTEN = 0.5  # seconds between two looks whether there is one: a thread's, for a step or an evaluation may take longer
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: its terminal was closed


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer; the message names it."""


class StoppedError(BaseException):
    """A signal inside ``StopSignals.at_once``; like KeyboardInterrupt nothing should catch it on its way."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Group:
    """This process among those of a run. ``Group()`` is alone; ``Group.join`` is what torchrun's variables say."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.asked = 0  # the stop signal that this process received
        self._flags: Tensor | None = None  # how many were asked to stop, by signal, as of the last step
        self._store: Any = None
        self._left = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="fastslots-roll-call", daemon=True)

    @classmethod
    def join(cls, device: torch.device, batch_size: int | None = None) -> Group:
        """Meet the others; alone where torchrun did not start this process. UserError where the group cannot work.

        batch_size: of training steps, each of which every process has a share of.
        """
        group, size = cls(), int(os.environ.get("WORLD_SIZE", "1"))
        if dist.is_available() and dist.is_initialized():
            if dist.get_world_size() > 1:  # alone in each process, all would compute the whole batch
                raise UserError("a process group is initialised already: call this before, or destroy it")
            return group
        if size == 1 or "RANK" not in os.environ:
            return group
        group.size, group.local_rank = size, int(os.environ.get("LOCAL_RANK", "0"))
        if batch_size is not None and batch_size < size:
            raise UserError(f"batch_size {batch_size} is less than the {size} processes: start fewer, or raise it")
        if device.type == "cuda" and group.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {group.local_rank} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}: set --nproc-per-node to that, or --device cpu"
            )
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        # gloo also on GPUs, for what is exchanged outside the steps
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store, group.rank, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            store = own_store(store, group.rank, size)
            group._store = PrefixStore("fastslots", store)
            group._store.set(f"who/{group.rank}", f"host {socket.gethostname()}, process id {os.getpid()}")
            if device.type == "cuda":
                torch.cuda.set_device(group.local_rank)
            dist.init_process_group(backend, store=store, rank=group.rank, world_size=size, timeout=TIMEOUT)
        except (RuntimeError, ValueError, OSError) as error:
            reason = first_line(error)
            raise UserError(f"the {size} processes cannot meet ({reason}): check torchrun's rendezvous") from None
        group._listener.start()
        return group

    @property
    def first(self) -> bool:
        """Whether this process writes what the run leaves."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: its own GPU where there are several processes."""
        return torch.device("cuda", self.local_rank) if self.size > 1 and device.type == "cuda" else device

    def share(self, count: int) -> range:
        """This process's part of ``count`` things in order: contiguous, sizes differing by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_step(self, parameters: Iterable[Tensor], values: Tensor) -> None:
        """Sum gradients and ``values`` (fp32 [n]) over all processes, in place. Parameters without one stay so."""
        if self.size == 1:
            return
        flags = torch.tensor([float(self.asked == s) for s in STOP_SIGNALS], device=values.device)
        parts = [p.grad for p in parameters if p.grad is not None] + [values, flags]
        flat = torch.cat([part.reshape(-1).float() for part in parts])
        self._together(lambda: dist.all_reduce(flat))
        for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))
        self._flags = flags

    def sum(self, values: list[float]) -> list[float]:
        """Sums of plain numbers over all processes, in float64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        self._together(lambda: dist.all_reduce(tensor))
        return tensor.tolist()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, [n, ...] with any n in each, one after another in the processes' order.

        Of several processes' on the CPU.
        """
        if self.size == 1:
            return rows
        rows = rows.cpu().contiguous()
        counts = [int(n) for n in self.sum([len(rows) * (rank == self.rank) for rank in range(self.size)])]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        self._together(lambda: dist.all_gather(parts, padded))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def stop_signal(self) -> int:
        """The signal after which to stop, 0 for none: the same on all processes after the same step."""
        if self.size == 1:
            return self.asked
        counts = [0.0] * len(STOP_SIGNALS) if self._flags is None else self._flags.tolist()
        return max((s for s, count in zip(STOP_SIGNALS, counts, strict=True) if count), default=0)

    def on_first(self, work: Callable[[], bytes]) -> bytes:
        """``work()`` on the first process alone; its bytes, or its UserError, on all."""
        if self.size == 1:
            return work()
        data = torch.empty(0, dtype=torch.uint8)
        failed = False
        if self.first:
            try:
                text = work()
            except UserError as error:
                text, failed = str(error).encode(), True
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else data
        head = torch.tensor([len(data), failed])
        self._together(lambda: dist.broadcast(head, 0))
        length, failed = head.tolist()
        data = data if self.first else torch.empty(length, dtype=torch.uint8)
        if length:
            self._together(lambda: dist.broadcast(data, 0))
        text = data.numpy().tobytes()
        if failed:
            raise UserError(text.decode())
        return text

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum([0.0])

    def leave(self) -> None:
        """Answer no more; a thread inside the store would not survive the interpreter's end."""
        self._left.set()
        if self._listener.is_alive():
            self._listener.join(ROLL_CALL)  # or the store does not answer

    def close(self) -> None:
        """Leave; after a failure the process ends without asking the others."""
        self.leave()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _together(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise self._lost(error) from None

    def _listen(self) -> None:
        """Answer a roll call, whatever this process is busy with."""
        try:
            while not self._left.wait(LISTEN):
                if self._store.check(["roll call"]):
                    self._store.set(f"alive/{self.rank}", "")
                    return
        except RuntimeError:  # the store went with its host; the next exchange fails
            pass

    def _lost(self, error: RuntimeError) -> LostProcessError:
        """Who is missing: those that do not answer a roll call, which each process holds whose exchange fails."""
        # gloo: [file of its source:line] what happened. Advice.
        reason = re.sub(r"^\[[^]]*\] ", "", first_line(error)).split(". ")[0]
        try:
            self._store.set("roll call", "")
            self._store.set(f"alive/{self.rank}", "")
            time.sleep(ROLL_CALL)
            missing = [rank for rank in range(self.size) if not self._store.check([f"alive/{rank}"])]
            names = "; ".join(f"process {rank} ({self._store.get(f'who/{rank}').decode()})" for rank in missing)
        except RuntimeError:  # the store went with its host
            names = "the process that holds the rendezvous"
        return LostProcessError(
            f"{names or 'a process'} of the {self.size} has ended or does not answer ({reason}): go on with --resume; "
            f"torchrun --max-restarts 3 does so by itself"
        )


def own_store(store: Any, rank: int, size: int) -> Any:
    """A part of the store that this start of the group has for itself; all ``size`` processes call this.

    torchrun keeps one store over its restarts. Without this, addresses of processes that have ended are taken for those
    of new ones that are slower to start, and who answered an earlier roll call seems to answer the next. Its count of
    restarts would not do: it may differ between machines.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    if rank == 0:
        name = uuid.uuid4().hex
        own = PrefixStore(name, store)
        store.set("fastslots/start", name)
        for other in range(1, size):
            own.set(f"welcome/{own.get(f'here/{other}').decode()}", "")
        return own
    nonce, deadline = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        own = PrefixStore(store.get("fastslots/start").decode(), store)  # perhaps that of an earlier start
        own.set(f"here/{rank}", nonce)
        look_again = time.monotonic() + LISTEN
        while time.monotonic() < look_again:
            if own.check([f"welcome/{nonce}"]):
                return own
            time.sleep(0.01)
    raise RuntimeError("process 0 does not answer")


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP (but not under nohup) ask to stop after a step. Alone, a second one stops at once; in
    a group later ones change nothing, because torchrun passes on what the processes have received already, and ends
    who is late."""

    def __init__(self, group: Group):
        self._group = group
        self._old: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # handlers may be set nowhere else
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
            self._old = {s: signal.signal(s, self._ask) for s in STOP_SIGNALS if s not in ignored}
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that may be left half done: a signal raises StoppedError in the middle of it."""
        self._raises = True
        try:
            if self._group.asked:  # just before
                raise StoppedError(self._group.asked)
            yield
        finally:
            self._raises = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self._group.asked = number
        if self._group.size == 1:
            signal.signal(number, self._old[number])
        if self._raises:
            self._raises = False  # once: what a second one does is said above
            raise StoppedError(number)
