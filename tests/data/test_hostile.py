"""Hostile or damaged files that the mutations of ``test_fuzz`` do not reach: paths, links, sizes, markup, JSON."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from tiny import MODEL_8
from wire import message

from fastslots.cli import main
from fastslots.data.open import decoded, pack
from fastslots.data.packed.dataset import DatasetInfo, PackedDataset
from fastslots.data.packed.features import FeatureDataset, Features, write_features
from fastslots.data.packed.writer import write_arrays
from fastslots.data.readers.hdf5 import Hdf5Reader
from fastslots.data.readers.multi_object import MultiObjectReader
from fastslots.data.readers.npz import MOST_BYTES, NpzReader
from fastslots.data.readers.pictures import ClevrReader, FolderReader
from fastslots.data.readers.tfrecord import masked_crc, parse_example
from fastslots.errors import UserError
from fastslots.train import TrainConfig, fit

TINY = dict(MODEL_8, batch_size=2, threads=1, eval_every=0, eval_images=2)

# ---- CLEVR's scenes file -------------------------------------------------------------------------------------------


def clevr(folder: Path, **scene) -> list:
    """What is read of a folder with one sound scene, and one more: {"split", "image_filename", "objects"}."""
    (folder / "images" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "scenes").mkdir(exist_ok=True)
    sound = {"split": "train", "image_filename": "a.png", "objects": [{"shape": "cube"}]}
    Image.fromarray(np.zeros((320, 480, 3), np.uint8)).save(folder / "images" / "train" / "a.png")
    (folder / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps({"scenes": [sound, sound | scene]}))
    return list(decoded(ClevrReader(folder), folder, 8))


@pytest.mark.parametrize(
    "scene",
    [
        {"image_filename": "../secret.png"},
        {"image_filename": "/etc/passwd"},
        {"image_filename": "..\\secret.png"},
        {"image_filename": ".."},
        {"split": "..", "image_filename": "secret.png"},
        {"split": "../..", "image_filename": "secret.png"},
        {"split": "/", "image_filename": "secret.png"},
        {"image_filename": "a.png\0"},
    ],
)
def test_scenes_name_no_picture_outside_the_data_folder(tmp_path, scene):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((320, 480, 3), np.uint8)).save(tmp_path / "secret.png")
    with pytest.raises(UserError, match="lies outside the data folder: mend that name"):
        clevr(tmp_path / "data", **scene)


def test_a_link_leads_to_no_picture_outside_the_data_folder(tmp_path):
    clevr(tmp_path / "data")
    train, secret = tmp_path / "data" / "images" / "train", tmp_path / "secret.png"
    shutil.copy(train / "a.png", secret)
    (train / "out.png").symlink_to(secret)
    (train / "in.png").symlink_to("a.png")
    assert "leads outside the data folder" in str(clevr(tmp_path / "data", image_filename="out.png")[1])
    assert clevr(tmp_path / "data", image_filename="in.png")[1].image.shape == (8, 8, 3)


def test_the_pictures_may_lie_on_another_disk(tmp_path):
    clevr(tmp_path / "data")
    shutil.move(tmp_path / "data" / "images", tmp_path / "elsewhere")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "train" / "b.png").symlink_to("a.png")
    assert clevr(tmp_path / "data", image_filename="b.png")[1].image.shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["x" * 300, "\ud800.png", "gone.png"])
def test_a_name_that_no_file_can_have_is_a_bad_record(tmp_path, name):
    sound, other = clevr(tmp_path, image_filename=name)
    assert sound.image.shape == (8, 8, 3) and isinstance(other, UserError)


def test_one_crowded_scene_does_not_swell_the_others(tmp_path):
    """Each scene's factors have room for the objects of the fullest: memory and disk would grow as its square."""
    with pytest.raises(UserError, match="a scene of 100,000 objects is too large, 254 are the most"):
        clevr(tmp_path, objects=[{}] * 100_000)


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [message(3, message(1, bytes(1 << 24))), message(1, b"\x0a\0" * (1 << 23))])
def test_a_small_file_of_a_huge_record_is_refused_at_once(tmp_path, features):
    """16 MiB of numbers or of empty texts, zipped to 16 kB."""
    payload = message(1, message(1, message(1, b"x") + message(2, features)))
    length = struct.pack("<Q", len(payload))
    path = tmp_path / "bomb.tfrecords"
    with gzip.open(path, "wb") as file:
        file.write(length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload)))
    assert path.stat().st_size < 20_000
    began = time.monotonic()
    with pytest.raises(UserError, match=r"record 0 at byte 0 is damaged .its length is 1677"):
        MultiObjectReader(path)
    assert time.monotonic() - began < 2


# ---- sizes and other programs ----------------------------------------------------------------------------------------


def test_pictures_start_no_other_program(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file's name."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(page)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        list(FolderReader(tmp_path).scenes())
    assert not started


def test_rows_of_an_npz_are_read_within_bounds(tmp_path):
    """65 kB of zeros, deflated, that claim an image of 67 MB; and many rows that are large together."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((1, 8200, 8200, 1), np.uint8))
    with pytest.raises(UserError, match="over 67,108,864 bytes a row"):
        NpzReader(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", arr_0=np.zeros((9, 2048, 2048, 3), np.uint8))
    tracemalloc.start()
    assert sum(1 for _ in NpzReader(tmp_path / "b.npz").scenes()) == 9
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * MOST_BYTES  # what is read, and a copy


def test_an_npz_that_is_read_whole_is_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("fastslots.data.readers.npz.MOST_WHOLE", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((9, 100, 100, 3), np.uint8, order="F"))
    assert sum(1 for _ in NpzReader(tmp_path / "a.npz").scenes()) == 9
    np.savez_compressed(tmp_path / "b.npz", arr_0=np.zeros((9, 600, 600, 3), np.uint8, order="F"))
    with pytest.raises(
        UserError, match=r"in Fortran order and of 9,720,000 bytes.*save numpy\.ascontiguousarray of it"
    ):
        NpzReader(tmp_path / "b.npz")


def test_chunks_of_hdf5_are_within_bounds(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (1 << 11, 128, 128, 3), "u1", chunks=(1 << 11, 128, 128, 3), compression="gzip")
        file["image"][0] = 0  # the whole chunk, 98 kB
    with pytest.raises(UserError, match="image has chunks of 100,663,296 bytes, too large"):
        list(Hdf5Reader(tmp_path / "a.h5").scenes())


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path) -> Path:
    part = Features(np.ones((3, 4, 5), np.float32), np.zeros((3, 8, 8), np.uint8), np.ones(3, np.uint8))
    info = DatasetInfo("sprites", "here", 3, 3, 8, True, False, None, "digest")
    write_features(tmp_path / "f", info, {}, "float16", lambda a, b: part, lambda: {"x": np.zeros((3, 2))}, 3)
    return tmp_path / "f"


@pytest.mark.parametrize("field", [{"mask_size": -8}, {"mask_size": 1 << 40}, {"kind": []}, {"max_objects": "6"}])
def test_features_that_describe_themselves_wrongly_are_refused(features, field):
    meta = json.loads((features / "meta.json").read_text())
    (features / "meta.json").write_text(json.dumps(meta | field))
    with pytest.raises(UserError, match=next(iter(field))):
        FeatureDataset(features)


def test_features_of_nested_json_are_refused(features):
    (features / "meta.json").write_bytes(DEEP)
    with pytest.raises(UserError, match="describes no features"):
        FeatureDataset(features)


def test_factors_of_other_images_are_refused(features):
    write_arrays(features / "factors.npz", {"x": np.zeros((2, 2))})
    with pytest.raises(UserError, match=r"x has shape \[2, 2\] for 3 images"):
        FeatureDataset(features)


# ---- a run's own files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fit(TrainConfig.preset("sprites-mini", **TINY, steps=3), out=tmp_path_factory.mktemp("hostile") / "run").out


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\u2028<!--"


def test_no_text_of_a_run_becomes_markup(run, tmp_path):
    """The folder's name, every text of the configuration, the data's name, the names of scores and splits, pictures."""
    evil = shutil.copytree(run, tmp_path / EVIL.replace("/", "∕"))
    config = json.loads((evil / "config.json").read_text())
    texts = {name: EVIL for name, value in config.items() if isinstance(value, str)}
    (evil / "config.json").write_text(json.dumps(config | texts | {EVIL: EVIL}))
    (evil / "data.txt").write_text(EVIL)
    (evil / "scores.json").write_text(json.dumps({"step": EVIL, "j_ari": [EVIL], EVIL: EVIL}))
    (evil / "explorer.json").write_text(json.dumps({"stamp": EVIL, "weights": EVIL, "images": [{"sheet": EVIL}]}))
    with open(evil / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": EVIL, EVIL: 1.0}) + "\n")
        log.write(json.dumps({"step": 3, "eval": EVIL, "j_ari": EVIL, EVIL: 1.0}) + "\n")
    (evil / "images" / f"step_{EVIL.replace('/', '')}.png").write_bytes(b"")
    assert main(["report", str(evil), "--no_explorer"]) == 0
    page = (evil / "report.html").read_text()
    plain, facts = page.split("<script type=application/json id=facts>")
    facts, scripts = facts.split("</script>", 1)
    assert json.loads(facts)["runs"][0]["config"]["data"] == EVIL  # it is all there,
    assert "<" not in facts and EVIL not in scripts  # and nothing of it can open or close an element
    assert "&lt;img src=x" in plain  # the folder's name, the one text that is markup's neighbour
    for markup in ("<script>alert", "<img src=x", "<!--"):
        assert markup not in page


DEEP = b"[" * 100_000


@pytest.mark.parametrize("name", ["config.json", "scores.json", "explorer.json", "data.txt", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        b"\xff\xfe{",
        b"[]",
        b'{"step": 1e999, "loss": NaN}\n',
        b'{"step": 3, "eval": "val", "j_ari": NaN, "x": 1e999}\n',
    ],
)
def test_a_page_is_made_of_whatever_a_run_holds(copy, name, content, capsys):
    (copy / name).write_bytes(content)
    assert main(["report", str(copy), "--no_explorer"]) == 0
    json.loads((copy / "report.html").read_text().split("id=facts>")[1].split("</script>")[0])


def test_pictures_that_are_torn_are_left_out_of_the_page(copy):
    (copy / "images" / "step_00000001.png").write_bytes(b"\x89PNG")
    (copy / "images" / "step_mine.png").write_bytes(b"")
    whole = (copy / "images" / "step_00000003.png").read_bytes()
    (copy / "images" / "step_00000002.png").write_bytes(whole[: len(whole) // 2])
    assert main(["report", str(copy), "--no_explorer"]) == 0
    facts = json.loads((copy / "report.html").read_text().split("id=facts>")[1].split("</script>")[0])
    assert [grid["step"] for grid in facts["runs"][0]["grids"]] == [3]


@pytest.mark.parametrize("content", [b"{", DEEP, b"\xff", b"[]", b'{"nonsense": 1}'])
@pytest.mark.parametrize("preset", [["sprites-mini"], []])
def test_a_damaged_configuration_is_named_by_a_resume(copy, content, preset, capsys):
    (copy / "config.json").write_bytes(content)
    assert main(["train", *preset, "--out", str(copy), "--resume"]) == 2
    assert str(copy / "config.json") in capsys.readouterr().err


# ---- claims ----------------------------------------------------------------------------------------------------------


def small_npz_that_claims(path: Path, claims: dict[str, tuple[int, ...]], **held: np.ndarray) -> None:
    """Members of a few bytes whose headers, and the archive's, say that they hold terabytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in held.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        for name, shape in claims.items():
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", buffer.getvalue())
            archive.getinfo(f"{name}.npy").file_size = buffer.tell() + math.prod(shape)


def test_an_npz_that_claims_terabytes_is_refused_from_its_header(tmp_path):
    path = tmp_path / "a.npz"
    small_npz_that_claims(path, {"arr_0": (1 << 28, 128, 128, 1)})
    with pytest.raises(UserError, match=r"it claims 4,398,046,511,104 bytes, more than a file of \d+ can hold"):
        NpzReader(path)


@pytest.mark.parametrize("shape", [(2, 1 << 40), (2, 1 << 25), (1 << 40, 1)])
def test_factors_that_claim_more_than_there_is_are_refused(tmp_path, shape):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros((2, 3)))
    pack(tmp_path / "a.npz", tmp_path / "packed")
    small_npz_that_claims(tmp_path / "packed" / "factors.npz", {"x": shape})
    tracemalloc.start()
    with pytest.raises(UserError, match=r"factors.npz is damaged .*x (cannot be read|is of|holds)"):
        PackedDataset(tmp_path / "packed").factors()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_hdf5_that_claims_a_thousand_million_images_is_refused(tmp_path):
    """Chunks that were never written: 5 kB of file, 49 TB once decoded."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (10**9, 128, 128, 3), "u1", chunks=(1, 128, 128, 3), compression="gzip")
    with pytest.raises(UserError, match=r"image claims 49,152,000,000,000 bytes, more than a file of [\d,]+ can hold"):
        Hdf5Reader(path)


@pytest.mark.parametrize(
    "value, words",
    [
        (message(3, message(1, b"\x01" * (1 << 22))), "a list has over 4,096 numbers"),
        (message(3, b"\x08\x01" * (1 << 21)), "a message has over 4,096 fields"),
        (message(2, message(1, b"\0\0\0\0") * (1 << 20)), "a message has over 4,096 fields"),
        (message(1, message(1, b"ab") * (1 << 20)), "a message has over 4,096 fields"),
    ],
)
def test_a_record_of_millions_of_numbers_is_refused_before_they_are_read(value, words):
    """They took 2 us each in Python: 16 records zipped to 30 kB a minute or two."""
    payload = message(1, message(1, message(1, b"x") + message(2, value)))
    began = time.process_time()
    with pytest.raises(ValueError, match=words):
        parse_example(payload)
    assert time.process_time() - began < 0.5
