"""What is fuzzed: small sound files, made here, and what reads a mutated form of them."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np
import torch
from fuzz_web import web_target
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
if importlib.util.find_spec("aiohttp"):  # else fsspec asks no web servers
    TARGETS["web server"] = Target(*web_target(packed_files), 3_000)
