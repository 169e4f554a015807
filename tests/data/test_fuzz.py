"""Damaged and hostile files: every reader answers with a UserError or with data, soon and within bounded memory.

Small seed files are mutated, some of them inside their checksums or archives so that the parsers behind those are
reached. The quick form lets hypothesis choose and shrink mutations; the long form runs 100,000 cases and
prints a table.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from wire import message

from fastslots.config.run import TrainConfig, read_config
from fastslots.data import SpritesDataset
from fastslots.data.open import decoded
from fastslots.data.packed.dataset import DatasetInfo, PackedDataset, digest
from fastslots.data.packed.features import FeatureDataset, Features, write_features
from fastslots.data.packed.writer import write_packed
from fastslots.data.readers.clevrtex import ClevrTexReader
from fastslots.data.readers.hdf5 import Hdf5Reader
from fastslots.data.readers.multi_object import MultiObjectReader
from fastslots.data.readers.npz import NpzReader
from fastslots.data.readers.pictures import ClevrReader, FolderReader
from fastslots.data.readers.scene import Scene
from fastslots.data.readers.tfrecord import masked_crc, parse_example
from fastslots.errors import UserError
from fastslots.models import SlotVAE
from fastslots.models.weights import read_state
from fastslots.report import render, run_facts
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import MetricsLog, read_metrics
from fastslots.train.checkpoint import Checkpoint, load_checkpoint

HEADROOM = 512 << 20  # bytes that a case may map beyond what the process has: the seeds have at most 40 KB
SECONDS = 20.0  # a case that takes longer hangs

# ---- mutations -------------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
OPERATIONS = 9
Mutation = tuple[int, float, int]  # which operation, where (0 to 1), with what


def mutate(data: bytes, mutations: list[Mutation]) -> bytes:
    out = bytearray(data)
    for operation, place, value in mutations:
        at, number = int(place * len(out)), NUMBERS[value % len(NUMBERS)]
        length = 1 + value % 64
        if operation == 0 and out:
            out[at] ^= 1 << value % 8
        elif operation == 1 and out:
            out[at] = value % 256
        elif operation == 2:
            out[at : at + 4] = struct.pack("<I", number & 0xFFFFFFFF)
        elif operation == 3:
            out[at : at + 8] = struct.pack(">Q" if value % 2 else "<Q", number)
        elif operation == 4:
            del out[at:]
        elif operation == 5:
            del out[at : at + length]
        elif operation == 6:
            out[at:at] = out[at : at + length]
        elif operation == 7:
            out[at:at] = random.Random(value).randbytes(length)
        elif digits := list(re.finditer(rb"\d+|true|false|null|\"[a-z_0-9]*\"", out)):  # text: another value
            found = digits[min(int(place * len(digits)), len(digits) - 1)]
            other = (str(number), f"-{number}", "null", "[]", '"x"', "1e999", "{}", "NaN")[value % 8]
            out[found.start() : found.end()] = other.encode()
    return bytes(out)


def random_mutations(rng: random.Random) -> list[Mutation]:
    return [
        (rng.randrange(OPERATIONS), rng.random(), rng.randrange(1 << 16)) for _ in range(rng.choice((1, 1, 2, 3, 6)))
    ]


# ---- targets: seed bytes, and what reads a mutated form of them ------------------------------------------------------


@dataclass(frozen=True)
class Target:
    seed: Callable[[], bytes]
    read: Callable[[bytes, Path], object]  # (mutated bytes, an empty folder)
    cases: int  # of the long form
    allowed: tuple[type[Exception], ...] = (UserError,)


def consume(reader_of: Callable, path: Path) -> None:
    for scene in decoded(reader_of(path), path, 8):
        assert isinstance(scene, UserError) or scene.image.shape == (8, 8, 3)


def file_read(reader_of: Callable, data: bytes, folder: Path) -> None:
    (folder / "x.bin").write_bytes(data)
    consume(reader_of, folder / "x.bin")


@cache
def example() -> bytes:
    """A Tetrominoes record: bytes, floats and integers."""
    features = {"image": message(1, message(1, bytes(35 * 35 * 3))), "mask": message(1, message(1, bytes(35 * 35 * 4)))}
    features |= {
        "x": message(2, message(1, np.arange(4, dtype="<f4").tobytes())),
        "shape": message(3, message(1, b"\1\2\3\4")),
    }
    return message(1, b"".join(message(1, message(1, k.encode()) + message(2, v)) for k, v in features.items()))


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))


@cache
def npy(dtype: type = np.uint8) -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros((3, 8, 8, 3), dtype))
    return out.getvalue()


def zipped(member: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", member)
    return out.getvalue()


@cache
def hdf5(chunked: bool) -> bytes:
    out = io.BytesIO()
    options = {"chunks": (2, 8, 8, 3), "compression": "gzip"} if chunked else {}
    with h5py.File(out, "w") as file:
        file.create_dataset("image", data=np.zeros((4, 8, 8, 3), np.uint8), **options)
        file["mask"], file["x"] = np.zeros((4, 8, 8, 1), np.uint8), np.zeros((4, 3), np.float32)
    return out.getvalue()


@cache
def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(SpritesDataset(0, 16).batch(np.arange(1))[0][0]).save(out, kind)
    return out.getvalue()


def read_pictures(suffix: str, data: bytes, folder: Path) -> None:
    (folder / f"a.{suffix}").write_bytes(data)
    consume(FolderReader, folder)


@cache
def scenes_json() -> bytes:
    thing = {
        "shape": "cube",
        "size": "large",
        "3d_coords": [1.0, 2.0, 0.5],
        "pixel_coords": [1, 2, 3.5],
        "rotation": 9.5,
    }
    scene = {"split": "train", "image_filename": "CLEVR_train_000000.png", "objects": [thing, thing]}
    return json.dumps({"scenes": [scene, scene]}).encode()


@cache
def clevr_picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((320, 480, 3), np.uint8)).save(out, "png")
    return out.getvalue()


def read_clevr(data: bytes, folder: Path) -> None:
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "images" / "train" / "CLEVR_train_000000.png").write_bytes(clevr_picture())
    (folder / "scenes").mkdir()
    (folder / "scenes" / "CLEVR_train_scenes.json").write_bytes(data)
    consume(ClevrReader, folder)


@cache
def packed(name: str) -> bytes:
    return packed_files()[name]


@cache
def packed_files() -> dict[str, bytes]:
    import tempfile

    images, masks, factors = SpritesDataset(0, 8).scenes(range(3))
    scenes = [Scene(images[i], masks[i], 2, {k: v[i] for k, v in factors.items()}) for i in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        write_packed(Path(folder) / "p", lambda start: iter(scenes[start:]), "sprites", "here", {})
        return {path.name: path.read_bytes() for path in (Path(folder) / "p").iterdir()}


def read_packed(name: str, data: bytes, folder: Path) -> None:
    for other, content in packed_files().items():
        (folder / other).write_bytes(data if other == name else content)
    dataset = PackedDataset(folder, max_objects=3)
    dataset.batch(np.arange(len(dataset)))
    assert digest(folder) and dataset.factors() is not None
    dataset.verify()


@cache
def features_files() -> dict[str, bytes]:
    import tempfile

    info = DatasetInfo("sprites", "here", 3, 3, 8, True, False, None, "digest")
    rng = np.random.default_rng(0)
    parts = Features(
        rng.random((3, 4, 5)).astype(np.float32), rng.integers(0, 3, (3, 8, 8), np.uint8), np.full(3, 2, np.uint8)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        compute = lambda start, stop: Features(*(part[start:stop] for part in parts))  # noqa: E731
        write_features(path, info, {"checkpoint": "x"}, "float16", compute, lambda: {"x": np.zeros((3, 2))}, 2)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def read_features(name: str, data: bytes, folder: Path) -> None:
    for other, content in features_files().items():
        (folder / other).write_bytes(data if other == name else content)
    dataset = FeatureDataset(folder, max_objects=3)
    dataset.batch(np.arange(len(dataset)))
    assert all(dataset[i]["factors"] is not None for i in range(len(dataset)))
    dataset.verify()


@cache
def clevrtex(name: str) -> bytes:
    out, mask = io.BytesIO(), np.zeros((10, 10), np.uint8)
    mask[2:5, 2:5] = 1
    if name == "a.json":
        return json.dumps({"objects": [{"shape": "cube"}, {"shape": "sphere"}]}).encode()
    picture = Image.fromarray(mask)
    if name == "a_flat.png":
        picture = picture.convert("P")
    picture.save(out, "png")
    return out.getvalue()


def read_clevrtex(name: str, data: bytes, folder: Path) -> None:
    for other in ("a.json", "a.png", "a_flat.png"):
        (folder / other).write_bytes(data if other == name else clevrtex(other))
    consume(ClevrTexReader, folder)


@cache
def state_dict() -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": {"module.a": torch.ones(2, 3), "b": torch.zeros(())}}, out)
    return out.getvalue()


def read_others_weights(data: bytes, folder: Path) -> None:
    (folder / "x.pth").write_bytes(data)
    read_state(folder / "x.pth")


def metrics() -> bytes:
    lines = [{"step": step, "loss": 0.5, "energy_wh": 0.25} for step in (1, 2, 3)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in [*lines, {"step": 3, "eval": "val", "j_ari": 0.5}])


def read_log(data: bytes, folder: Path) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    (folder / "config.json").write_text("{}")
    render([run_facts(folder)])
    MetricsLog(RunFolder(folder), 2).close()
    read_metrics(folder / "metrics.jsonl")


@cache
def checkpoint() -> bytes:
    tensors = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.0.1.step": torch.ones(())}
    return Checkpoint(7, tensors, {"0.1.lr": 0.5}, {"best": 1.5, "scaler": {}}).to_bytes()


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def with_header(data: bytes, header: bytes) -> bytes:
    """The same safetensors file with another header, its length set right."""
    return len(header).to_bytes(8, "little") + header + data[8 + len(header_of(data)) :]


def read_checkpoint(data: bytes, folder: Path) -> None:
    (folder / "step_1.safetensors").write_bytes(data)
    load_checkpoint(folder / "step_1.safetensors")


SMALL = {"resolution": 8, "num_slots": 2, "slot_dim": 2, "cnn_channels": 2, "encoder_layers": 1, "query_width": 4}
SMALL |= {"query_hidden": 4, "slot_width": 4, "slot_hidden": 4, "decoder_heads": 1, "decoder_layers": 1}


@cache
def weights() -> bytes:
    return SlotVAE(TrainConfig(**{**SMALL, "output_hidden": (4,)})).weights_bytes()


def read_weights(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    SlotVAE.from_file(folder / "model.safetensors")


def read_fields(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    read_config(folder / "config.json")


TARGETS = {
    "TFRecord": Target(lambda: frame(example()) * 2, partial(file_read, MultiObjectReader), 8_000),
    "TFRecord, sealed": Target(example, lambda d, f: file_read(MultiObjectReader, frame(d) * 2, f), 8_000),
    "tf.train.Example": Target(example, lambda d, f: parse_example(d), 30_000, (ValueError, KeyError)),
    "npz": Target(lambda: zipped(npy()), partial(file_read, NpzReader), 8_000),
    "npz, sealed": Target(npy, lambda d, f: file_read(NpzReader, zipped(d), f), 5_000),
    "npz of floats, sealed": Target(partial(npy, np.float32), lambda d, f: file_read(NpzReader, zipped(d), f), 3_000),
    "HDF5": Target(partial(hdf5, False), partial(file_read, Hdf5Reader), 4_000),
    "HDF5, chunked": Target(partial(hdf5, True), partial(file_read, Hdf5Reader), 4_000),
    "PNG": Target(partial(picture, "png"), partial(read_pictures, "png"), 5_000),
    "JPEG": Target(partial(picture, "jpeg"), partial(read_pictures, "jpg"), 3_000),
    "WebP": Target(partial(picture, "webp"), partial(read_pictures, "webp"), 2_000),
    "CLEVR JSON": Target(scenes_json, read_clevr, 4_000),
    "packed meta.json": Target(partial(packed, "meta.json"), partial(read_packed, "meta.json"), 4_000),
    "packed factors": Target(partial(packed, "factors.npz"), partial(read_packed, "factors.npz"), 3_000),
    "packed arrays": Target(partial(packed, "objects.u8"), partial(read_packed, "objects.u8"), 1_000),
    "features meta.json": Target(lambda: features_files()["meta.json"], partial(read_features, "meta.json"), 3_000),
    "features factors": Target(lambda: features_files()["factors.npz"], partial(read_features, "factors.npz"), 2_000),
    "ClevrTex mask": Target(partial(clevrtex, "a_flat.png"), partial(read_clevrtex, "a_flat.png"), 2_000),
    "ClevrTex JSON": Target(partial(clevrtex, "a.json"), partial(read_clevrtex, "a.json"), 1_000),
    "others' weights": Target(state_dict, read_others_weights, 2_000),
    "metrics.jsonl": Target(metrics, read_log, 2_000),
    "checkpoint": Target(checkpoint, read_checkpoint, 5_000),
    "checkpoint header": Target(
        lambda: header_of(checkpoint()), lambda d, f: read_checkpoint(with_header(checkpoint(), d), f), 5_000
    ),
    "weights": Target(weights, read_weights, 1_000),
    "weights header": Target(
        lambda: header_of(weights()), lambda d, f: read_weights(with_header(weights(), d), f), 1_500
    ),
    "config.json": Target(lambda: TrainConfig().to_json().encode(), read_fields, 3_000),
}

# ---- running a case --------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


@contextmanager
def limits() -> Iterator[None]:
    """Cases may take ``SECONDS`` each and map ``HEADROOM`` more than the process has."""

    def hang(*_: object) -> None:
        raise Hang

    old, memory = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, memory[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def run_case(target: Target, data: bytes, folder: Path) -> str:
    """'read', 'refused', or what went wrong: 'hang', 'over-allocation', 'crash: ...'."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(data, folder)
        return "read"
    except target.allowed as error:
        # A reader that reports a failed allocation had believed a size that the file claims
        return "over-allocation" if re.search("allocate|MemoryError", str(error)) else "refused"
    except Hang:
        return "hang"
    except MemoryError:
        return "over-allocation"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_refused(name, tmp_path):
    target = TARGETS[name]
    seed = target.seed()
    assert run_case(target, seed, tmp_path) == "read", "the seed itself must be sound"

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.integers(0, OPERATIONS - 1), st.floats(0, 1, exclude_max=True), st.integers(0, (1 << 16) - 1)),
            min_size=1,
            max_size=6,
        )
    )
    def case(mutations: list[Mutation]) -> None:
        assert run_case(target, mutate(seed, mutations), tmp_path) in ("read", "refused")

    with limits():
        case()


FOUND = (  # by the long form: an encrypted member, a type without a NumPy equivalent, fields of another type
    ("npz", [(2, 0.6467700978386741, 59501)]),
    ("npz", [(1, 0.3246098319071088, 57377), (1, 0.6498868060352899, 2971)]),
    ("HDF5", [(2, 0.9232173762227837, 9348)]),
    ("config.json", [(8, 0.6058386400683866, 14530)]),
    ("config.json", [(8, 0.6053099672937724, 40152)]),
    ("config.json", [(8, 0.3625770079689645, 31956)]),
    ("config.json", [(8, 0.3728637587607473, 16615)]),
)


@pytest.mark.parametrize("name, mutations", FOUND)
def test_what_was_found_is_refused(name, mutations, tmp_path):
    assert run_case(TARGETS[name], mutate(TARGETS[name].seed(), mutations), tmp_path) in ("read", "refused")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("optimizer", None, "optimizer must be text, got None"),
        ("compile", 3, "compile must be true or false, got 3"),
        ("output_hidden", ["x"], "output_hidden must be a list of whole numbers"),
        ("output_hidden", 5, "output_hidden must be a list of whole numbers"),
        ("output_hidden", [2.5], "output_hidden must be a list of whole numbers"),
        ("lr", 10**400, "lr must be a number"),
        ("steps", 1 << 63, "steps must be a whole number"),
    ],
)
def test_fields_of_another_type_are_named(field, value, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**{field: value})


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_files(tmp_path):
    """Prints reader, cases, and how they ended; every number of the last three columns must be zero.

    FASTSLOTS_FUZZ_SEED (any text) gives cases that no run has seen, FASTSLOTS_FUZZ_SHARE a part of their number.
    """
    assert sum(target.cases for target in TARGETS.values()) >= 100_000
    share = float(os.environ.get("FASTSLOTS_FUZZ_SHARE", "1"))
    wrong: list[str] = []
    rows = [f"{'reader':<24}{'cases':>8}{'read':>8}{'refused':>9}{'crashes':>9}{'hangs':>7}{'over-alloc.':>13}"]
    with limits():
        for name, target in TARGETS.items():
            rng, seed = random.Random(name + os.environ.get("FASTSLOTS_FUZZ_SEED", "")), target.seed()
            counts = dict.fromkeys(("read", "refused", "crash", "hang", "over-allocation"), 0)
            for _ in range(int(target.cases * share)):
                mutations = random_mutations(rng)
                end = run_case(target, mutate(seed, mutations), tmp_path)
                counts[end.split(":")[0]] += 1
                if end not in ("read", "refused"):
                    wrong.append(f"{name}: {end}: {mutations}")
            columns = zip(counts.values(), (8, 9, 9, 7, 13), strict=True)
            rows.append(f"{name:<24}{sum(counts.values()):>8}" + "".join(f"{n:>{width}}" for n, width in columns))
    print("\n" + "\n".join(rows))
    assert not wrong, "\n".join(wrong[:50])


# ---- what a mutation would not find ----------------------------------------------------------------------------------


class Bomb:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "bomb-went-off"),)


def test_pickles_are_never_executed(tmp_path):
    """Not as a data set, a member, a checkpoint, weights or a configuration."""
    bomb = pickle.dumps(Bomb(tmp_path))
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(tmp_path)], object))
    saved = io.BytesIO()
    torch.save({"model": Bomb(tmp_path)}, saved)
    for number, data in enumerate((bomb, zipped(objects.getvalue()), saved.getvalue())):
        for name, target in TARGETS.items():
            folder = tmp_path / f"{number}-{name}"
            folder.mkdir()
            if target.allowed == (UserError,):
                assert run_case(target, data, folder) in ("read", "refused"), name
    assert not (tmp_path / "bomb-went-off").exists()


def test_claims_beyond_the_file_allocate_nothing(tmp_path):
    """Headers that promise terabytes in a few hundred bytes."""
    big_png = bytearray(picture("png"))
    big_png[16:24] = struct.pack(">II", 8000, 8000)
    big_png[29:33] = struct.pack(">I", zlib.crc32(big_png[12:29]))
    (tmp_path / "a.png").write_bytes(big_png)
    with h5py.File(tmp_path / "big.h5", "w") as file:
        file.create_dataset("image", (1 << 20, 1 << 14, 1 << 14, 3), "u1", chunks=(1, 64, 64, 3))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    with limits():
        with pytest.raises(UserError, match="too large"):
            list(Hdf5Reader(tmp_path / "big.h5").scenes())
        with pytest.raises(UserError, match="8000 x 8000 pixels are too many"):
            FolderReader(tmp_path)
        (tmp_path / "c").mkdir()
        assert run_case(TARGETS["checkpoint"], with_header(checkpoint(), header), tmp_path / "c") == "refused"
