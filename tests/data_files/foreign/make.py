"""Writes the files of this folder with the tools that others use, and what these tools read back from them.

python tests/data_files/foreign/make.py     needs pycocotools, webdataset, datasets, tfrecord and pillow

Four scenes of 16 x 16, with two or three objects; ``expected.npz`` holds what each tool itself reads: images, and masks
as it gives them. Tests compare the readers of fastslots with it, and with the tool again where it is installed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIDE, COUNT = 16, 4


def scenes() -> tuple[np.ndarray, np.ndarray]:
    """Noise, with brighter rectangles whose labels are 1, 2, ..."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 120, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.zeros((COUNT, SIDE, SIDE), np.uint8)
    for i in range(COUNT):
        for label in range(1, 3 + i % 2):
            y, x = 5 * (label - 1), 3 * i + label
            masks[i, y : y + 5, x : x + 4] = label
            images[i, y : y + 5, x : x + 4] += np.uint8(40 * label)
    return images, masks


def coco(images: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Polygons, run-length codes of both kinds, an overlap and a crowd; read back by pycocotools' COCO."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO

    folder = fresh("coco")
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    annotations, number = [], 0
    for i in range(COUNT):
        Image.fromarray(images[i]).save(folder / "val2017" / f"{i:012}.png")
        for label in np.unique(masks[i][masks[i] > 0]):
            region = np.asfortranarray(masks[i] == label).astype(np.uint8)
            code = rle.encode(region)
            y, x = (axis.min() for axis in np.nonzero(region))
            kind = number % 3
            if kind == 0:
                shape = [[float(v) for v in (x, y, x + 4, y, x + 4, y + 5, x, y + 5)]]
            elif kind == 1:
                shape = {"size": [SIDE, SIDE], "counts": code["counts"].decode()}
            else:
                flat = region.flatten(order="F")
                edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
                shape = {"size": [SIDE, SIDE], "counts": np.diff(np.concatenate([[0], edges])).tolist()}
            number += 1
            annotations.append({"id": number, "image_id": i, "category_id": 10 + int(label), "iscrowd": 0,
                                "segmentation": shape, "area": int(region.sum()), "bbox": [0, 0, 1, 1]})  # fmt: skip
    # a large object under all others of the first scene, and a crowd in the second
    annotations.append({"id": 90, "image_id": 0, "category_id": 7, "iscrowd": 0, "area": 256, "bbox": [0, 0, 1, 1],
                        "segmentation": [[0.0, 0.0, 12.0, 0.0, 12.0, 12.0, 0.0, 12.0]]})  # fmt: skip
    crowd = np.zeros((SIDE, SIDE), np.uint8)
    crowd[:, 12:] = 1
    code = rle.encode(np.asfortranarray(crowd))
    annotations.append({"id": 91, "image_id": 1, "category_id": 7, "iscrowd": 1, "area": 1, "bbox": [0, 0, 1, 1],
                        "segmentation": {"size": [SIDE, SIDE], "counts": code["counts"].decode()}})  # fmt: skip
    listed = [{"id": i, "file_name": f"{i:012}.png", "height": SIDE, "width": SIDE} for i in range(COUNT)]
    categories = [{"id": k, "name": f"thing {k}"} for k in (7, 11, 12, 13)]
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": listed, "annotations": annotations, "categories": categories}))
    captions = {"info": {}, "images": listed, "annotations": [{"id": 1, "image_id": 0, "caption": "boxes"}]}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(captions))
    return read_coco(COCO(path), folder / "val2017")


def read_coco(found, pictures: Path) -> dict[str, np.ndarray]:
    """Entries of pycocotools' annToMask, [COUNT, 6, SIDE, SIDE] in the order of annotations; crowds apart."""
    entries, crowds = np.zeros((COUNT, 6, SIDE, SIDE), np.uint8), np.zeros((COUNT, SIDE, SIDE), np.uint8)
    images = []
    for i in found.getImgIds():
        images.append(np.asarray(Image.open(pictures / found.loadImgs(i)[0]["file_name"]).convert("RGB")))
        things = found.loadAnns(found.getAnnIds(i, iscrowd=False))
        for k, annotation in enumerate(things):
            entries[i, k] = found.annToMask(annotation)
        for annotation in found.loadAnns(found.getAnnIds(i, iscrowd=True)):
            crowds[i] |= found.annToMask(annotation)
    return {"images": np.stack(images), "entries": entries, "crowds": crowds}


def web(images: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Two shards by webdataset's writer, PNG and JPEG, masks as PNG and npy; read back by its own pipeline."""
    import webdataset as wds

    folder = fresh("webdataset")
    for shard, (kind, mask) in enumerate((("png", "mask.png"), ("jpg", "seg.npy"))):
        with wds.TarWriter(str(folder / f"shard-{shard:06}.tar")) as writer:
            for i in range(2 * shard, 2 * shard + 2):
                labels = masks[i] if mask == "seg.npy" else np.repeat(masks[i][..., None], 3, 2)
                writer.write({"__key__": f"train/{i:05}", kind: images[i], mask: labels, "cls": i,
                              "json": {"count": int(masks[i].max()), "where": [i, i + 1], "name": "x"}})  # fmt: skip
    return read_web(folder)


def read_web(folder: Path) -> dict[str, np.ndarray]:
    import webdataset as wds

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    images, masks = [], []
    for sample in wds.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        images.append(sample.get("png", sample.get("jpg")))
        mask = sample.get("mask.png", sample.get("seg.npy"))
        masks.append(mask[..., 0] if mask.ndim == 3 else mask)
    return {"images": np.stack(images), "masks": np.stack(masks)}


def hugging_face(images: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Parquet as the hub has it, and ``save_to_disk``; read back by datasets."""
    import datasets

    rows = {"image": [Image.fromarray(image) for image in images], "mask": [Image.fromarray(mask) for mask in masks],
            "area": [[float((m == 1).sum()), float((m == 2).sum())] for m in masks],
            "objects": masks.max((1, 2)).tolist(), "caption": [f"scene {i}" for i in range(COUNT)]}  # fmt: skip
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "area": datasets.Sequence(datasets.Value("float32")),
         "objects": datasets.Value("int64"), "caption": datasets.Value("string")}
    )  # fmt: skip
    made = datasets.Dataset.from_dict(rows, features)
    (fresh("hub") / "data").mkdir()
    made.to_parquet(HERE / "hub" / "data" / "train-00000-of-00001.parquet")
    made.save_to_disk(fresh("on_disk"))
    arrays = datasets.Features({"image": datasets.Image(), "segmentation": datasets.Array2D((SIDE, SIDE), "uint8")})
    nested = datasets.Dataset.from_dict({"image": rows["image"], "segmentation": list(masks)}, arrays)
    nested.to_parquet(fresh("nested") / "arrays.parquet")
    return read_hugging_face()


def read_hugging_face() -> dict[str, np.ndarray]:
    import datasets

    cache = HERE / ".cache"
    hub = datasets.load_dataset("parquet", data_dir=str(HERE / "hub" / "data"), split="train", cache_dir=str(cache))
    disk = datasets.load_from_disk(HERE / "on_disk")
    found = {}
    for name, made in (("hub", hub), ("disk", disk)):
        found[f"{name}_images"] = np.stack([np.asarray(row["image"]) for row in made])
        found[f"{name}_masks"] = np.stack([np.asarray(row["mask"]) for row in made])
    shutil.rmtree(cache, ignore_errors=True)
    return found


def movi(images: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Two videos of two frames in the layout of TensorFlow Datasets, by the tfrecord package; read back by it."""
    from tfrecord.writer import TFRecordWriter

    folder = fresh("movi_a/128x128/1.0.0")
    (folder / "dataset_info.json").write_text(json.dumps({"name": "movi_a", "version": "1.0.0"}))
    for shard in range(2):
        writer = TFRecordWriter(str(folder / f"movi_a-train.tfrecord-{shard:05}-of-00002"))
        rows = range(2 * shard, 2 * shard + 2)
        writer.write({"video": ([png(images[i]) for i in rows], "byte"),
                      "segmentations": ([png(masks[i]) for i in rows], "byte"),
                      "metadata/num_instances": (3, "int"), "metadata/video_name": (b"1", "byte"),
                      "instances/visibility": ([10, 20, 30], "int"), "camera/focal": (35.0, "float")})  # fmt: skip
        writer.close()
    return read_movi(folder)


def read_movi(folder: Path) -> dict[str, np.ndarray]:
    """By the package's framing and its protobuf; its parser of Examples keeps the first of several values alone."""
    import io

    from tfrecord import example_pb2
    from tfrecord.reader import tfrecord_iterator

    found: dict[str, list[np.ndarray]] = {"video": [], "segmentations": []}
    for path in sorted(folder.glob("*.tfrecord-*")):
        for record in tfrecord_iterator(str(path)):
            example = example_pb2.Example()
            example.ParseFromString(bytes(record))
            for name, frames in found.items():
                values = example.features.feature[name].bytes_list.value
                frames += [np.asarray(Image.open(io.BytesIO(value))) for value in values]
    return {"images": np.stack(found["video"]), "masks": np.stack(found["segmentations"])}


def png(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def fresh(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    images, masks = scenes()
    made = {"coco": coco, "webdataset": web, "huggingface": hugging_face, "movi": movi}
    expected = {f"{name}/{key}": value for name, make in made.items() for key, value in make(images, masks).items()}
    np.savez_compressed(HERE / "expected.npz", images=images, masks=masks, **expected)


if __name__ == "__main__":
    main()
