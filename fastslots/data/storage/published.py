"""Published sets by name: where they live, how large they are, under which terms, and how they are trained on.

Addresses and terms are those of the publishers' pages. Sizes in GB are what these pages say; where they say none, the
server does when a file is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

_DEEPMIND = "https://storage.googleapis.com/multi-object-datasets"
_REPOSITORY = "https://github.com/google-deepmind/multi_object_datasets"


@dataclass(frozen=True)
class File:
    """One file of a set."""

    url: str
    gigabytes: float | None = None
    md5: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Published:
    """A set as its authors publish it."""

    title: str
    page: str
    licence: str
    files: tuple[File, ...]
    use: str  # flags of ``fastslots train``, beside --data

    def __str__(self) -> str:
        sizes = [file.gigabytes for file in self.files]
        known = f"{sum(s for s in sizes if s):.1f} GB" if all(sizes) else "said by the server"
        lines = {"data set": self.title, "page": self.page, "licence": self.licence, "size": known}
        text = "\n".join(f"{name:<12} {value}" for name, value in lines.items())
        return text + "".join(f"\n{'file':<12} {file.url}" for file in self.files)


def _tfrecords(title: str, *names: str, use: str) -> Published:
    licence = "Apache 2.0 (the repository's; it names no other for the data)"
    return Published(title, _REPOSITORY, licence, tuple(File(f"{_DEEPMIND}/{n}.tfrecords") for n in names), use)


def _clevrtex() -> Published:
    base = "https://thor.robots.ox.ac.uk/datasets/clevrtex"
    files = tuple(File(f"{base}/clevrtex_full_part{part}.tar.gz", 4.7) for part in range(1, 6))
    page = "https://www.robots.ox.ac.uk/~vgg/data/clevrtex/"
    return Published(
        "ClevrTex, 50,000 scenes with masks", page, "as its page says", files, "clevr6-mini --max_objects 0"
    )


PUBLISHED = {
    "clevr6": _tfrecords(
        "CLEVR with masks, 100,000 scenes of 3 to 10 objects; CLEVR6 is its scenes of at most 6",
        "clevr_with_masks/clevr_with_masks_train", use="clevr6",
    ),
    "multi-dsprites": _tfrecords(
        "Multi-dSprites, coloured sprites on grey, 1,000,000 scenes",
        "multi_dsprites/multi_dsprites_colored_on_grayscale", use="sprites --max_objects 0",
    ),
    "objects-room": _tfrecords(
        "Objects Room, 1,000,000 scenes of up to three objects",
        "objects_room/objects_room_train", use="sprites --max_objects 0",
    ),
    "tetrominoes": _tfrecords(
        "Tetrominoes, scenes of three", "tetrominoes/tetrominoes_train", use="sprites-mini --resolution 32",
    ),
    "clevr-v1": Published(
        "CLEVR v1.0, 100,000 pictures without masks; another render than CLEVR with masks",
        "https://cs.stanford.edu/people/jcjohns/clevr/", "CC BY 4.0",
        (File("https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip", 19.0),), "clevr6",
    ),
    "clevrtex": _clevrtex(),
    "voc2012": Published(
        "Pascal VOC 2012, photographs; those of its segmentation task have masks",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/", "Flickr's terms of use, as its page says",
        (File("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", 2.0,
              "6cd6e144f989b92b3379bac3b3de84fd"),),
        "clevr6-mini --max_objects 0",
    ),
}  # fmt: skip
"""Name, as in ``fastslots data get NAME`` -> set."""
