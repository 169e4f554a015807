"""One image and its mask as checked arrays, whoever gives them: a reader of files or a data set handed to ``fit``.

An image is uint8 [H, W, 3], or floats in [0, 1]; a mask is a map [H, W] of whole labels, 0 = background. What is meant
is either certain from shape, type and values, or refused with a sentence that names the record, the value and the mend.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastslots.errors import UserError

ORIENTATION = 0x0112  # of EXIF: how a camera was held
UNDO = "undo their scaling (x * std + mean) and give floats in [0, 1], or uint8"
TRANSPARENT = "is transparent in places: lay it on a background (Image.alpha_composite), or drop the alpha channel"
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # Pillow's modes with an alpha channel
MOST_LABEL = 255  # in a map of 8 bits
VOID = 255  # the label by which Pascal VOC and others say "do not score"
HIGHEST = 100  # labels below it are numbers of objects or classes, so that 255 beside them means something else
FEATURES = 5  # channels and more: features of a network, of whatever values


# ---- images ----------------------------------------------------------------------------------------------------------


def pixels_of(picture: Image.Image, name: str) -> np.ndarray:
    """A picture as a viewer shows it, uint8 [H, W, 3]: turned as its EXIF data say.

    UserError: more than 8 bits a channel, or transparent (an alpha channel that is opaque everywhere is dropped).
    """
    if picture.mode.startswith(("I", "F")):  # Pillow would cut 16-bit values off at 255
        raise UserError(f"{name} has more than 8 bits a channel: save it with 8")
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF data, which viewers leave aside as well
        orientation = picture.getexif().get(ORIENTATION, 1)
    if orientation in range(2, 9):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ALPHA or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min(initial=255) < 255:
            raise UserError(f"{name} {TRANSPARENT}")
    return np.asarray(picture.convert("RGB"))


def to_uint8(image: np.ndarray, name: str) -> np.ndarray:
    """Pixels [H, W, C] as uint8: as they are, or floats in [0, 1] scaled. UserError as of ``check_pixels``."""
    check_pixels(image, name)
    return image if image.dtype == np.uint8 else (image * 255 + 0.5).astype(np.uint8)


def check_pixels(image: np.ndarray, name: str, finite: bool = True) -> None:
    """UserError unless they are uint8, or floats in [0, 1]; finite: and none of them NaN or infinite."""
    if image.dtype == np.uint8:
        return
    if image.dtype.kind != "f":
        deep = image.dtype.kind in "iu" and image.size and image.max() > 255
        mend = "divide 16-bit values by 257 and cast them to uint8" if deep else "cast them to uint8"
        raise UserError(f"{name} holds {image.dtype}: expected uint8, or floats in [0, 1]: {mend}")
    numbers = np.isfinite(image)
    if finite and not numbers.all():
        raise UserError(f"{name} has NaN or infinite pixels: remove or mend that image")
    values = image if numbers.all() else image[numbers]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low < 0 or high > 1:
        mend = "divide by 255, or give uint8" if low >= 0 and 2 < high <= 255 else UNDO
        raise UserError(f"{name} has values from {low:.3g} to {high:.3g}, expected floats in [0, 1]: {mend}")


def image_of(value: Any, name: str) -> np.ndarray:
    """An image of a data set in memory: uint8 [H, W, 3], or floats [C, H, W] in [0, 1].

    value: a PIL picture; an array or tensor, gray [H, W] or with one or three channels, first or last; uint8 or floats.
    Five channels and more are features, of any floats. NaN is left to training, which stops at the step that draws it,
    with good weights and the batch. UserError for anything else.
    """
    if isinstance(value, Image.Image):
        return pixels_of(value, name)
    image = _array(value, name)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3:
        raise UserError(f"{name} has shape {list(image.shape)}, expected an image [H, W, 3] or [3, H, W]")
    if image.dtype.kind == "f" and _channels_first(image) and len(image) >= FEATURES:
        return image
    last = image.shape[2] in (1, 3, 4) and not (image.shape[0] in (1, 3) and image.shape[2] not in (1, 3))
    if not last and image.shape[0] not in (1, 3, 4):
        raise UserError(f"{name} has shape {list(image.shape)}, expected an image [H, W, 3] or [3, H, W]")
    image = image if last else image.transpose(1, 2, 0)
    if image.shape[2] == 4:
        raise UserError(
            f"{name} has shape {list(np.shape(value))}, with an alpha channel: give red, green and blue alone"
        )
    check_pixels(image, name, finite=False)
    if image.dtype == np.uint8:
        return np.broadcast_to(image, (*image.shape[:2], 3))
    return image.transpose(2, 0, 1)


def _channels_first(image: np.ndarray) -> bool:
    """Whether [C, H, W] rather than [H, W, C], by the two sides that are equal, or by a channel count of pixels."""
    if image.shape[2] in (1, 3, 4) and image.shape[0] not in (1, 3, 4):
        return False
    return image.shape[0] in (1, 3, 4) or image.shape[1] == image.shape[2]


# ---- masks -----------------------------------------------------------------------------------------------------------


def void_label(seen: set[int]) -> int | None:
    """The label of pixels that are not scored, where the labels of a set show that it has one."""
    others = seen - {0, VOID}
    return VOID if VOID in seen and others and max(others) <= HIGHEST else None


def to_labels(mask: np.ndarray, name: str, most: int = MOST_LABEL) -> np.ndarray:
    """Whole labels 0..most (integers, bool, or floats that are whole) in the smallest type, uint8 up to 255.

    UserError names the map with others.
    """
    if mask.dtype.kind == "f":
        if not (np.isfinite(mask).all() and (mask == np.rint(mask)).all()):
            raise UserError(
                f"{name} holds {mask.dtype}: expected integer labels, and these are not whole: a map that was scaled "
                f"(torchvision's ToTensor divides by 255) or resized smoothly has lost them: give the labels themselves"
            )
        mask = mask.clip(-1, most + 1).astype(np.int64)
    if mask.dtype.kind not in "iub":
        raise UserError(f"{name} holds {mask.dtype}: expected integer labels")
    low, high = (int(mask.min()), int(mask.max())) if mask.size else (0, 0)
    if low < 0:
        raise UserError(
            f"{name} has labels from {low} to {high}, expected 0 = background and no negative ones: where -1 is the "
            f"background add 1 to all"
        )
    if high > most:
        raise UserError(
            f"{name} has labels from {low} to {high}, expected 0 (background) to {most}: number the objects of each "
            f"image anew (numpy.unique with return_inverse)"
        )
    return mask.astype(np.uint8 if high <= MOST_LABEL else np.int64)


def mask_of(value: Any, size: tuple[int, int], name: str, most: int = MOST_LABEL) -> np.ndarray:
    """A mask of an image of ``size`` (height, width) as labels [H, W].

    value: labels [H, W], [1, H, W] or [H, W, 1]; one-hot entries [N, H, W] or [H, W, N]; colours [H, W, 3], black the
    background; a PIL picture of any of these. UserError for anything else, another size, or entries that overlap.
    """
    mask = np.asarray(value) if isinstance(value, Image.Image) else _array(value, name)
    if mask.ndim == 4 and 1 in (mask.shape[1], mask.shape[3]):  # [N, H, W, 1], as multi_object_datasets store them
        mask = mask.squeeze(3 if mask.shape[3] == 1 else 1)
    first, last = mask.ndim == 3 and mask.shape[1:] == size, mask.ndim == 3 and mask.shape[:2] == size
    if not (mask.shape == size or first or last):
        raise UserError(
            f"{name} has shape {list(mask.shape)}, but its image is {size[0]} x {size[1]}: give a map of the labels of "
            f"its pixels, [H, W]"
        )
    if mask.ndim == 2:
        return to_labels(mask, name, most)
    entries = mask if first else mask.transpose(2, 0, 1)
    if len(entries) == 1:
        return to_labels(entries[0], name, most)
    if last and len(entries) in (3, 4) and mask.dtype == np.uint8 and not _is_one_hot(entries):
        return labels_of_colours(mask, name)
    if len(entries) > most + 1:
        raise UserError(f"{name} has {len(entries)} entries: expected at most {most + 1}")
    return labels_of_one_hot(entries, name)


def _is_one_hot(entries: np.ndarray) -> bool:
    """Whether one entry owns each pixel, or none does where all are 0 or 1 (0 or 255 may be colours)."""
    on = entries != 0
    high = int(entries.max(initial=0))
    exact = (entries[on] == high).all() and (on.sum(0) <= 1).all()
    return bool(exact and (high == 1 or on.any(0).all()))


def labels_of_one_hot(entries: np.ndarray, name: str) -> np.ndarray:
    """Entries [N, H, W], 0 or one other value, of which at most one owns a pixel -> labels [H, W].

    Where each pixel has an owner, entry 0 is the background; else entries count from 1 and the rest is background.
    """
    on = entries != 0
    if on.any() and (entries[on] != entries[on].flat[0]).any():
        raise UserError(
            f"{name} has shape {list(entries.shape)} and is not one-hot: give labels [H, W], or entries of 0 and 1"
        )
    owners = on.sum(0)
    if (owners > 1).any():
        y, x = (int(i[0]) for i in np.nonzero(owners > 1))
        raise UserError(
            f"{name} has {int(owners.max())} entries that overlap (at row {y}, column {x}): give each pixel one owner"
        )
    labels: np.ndarray = on.argmax(0) + (0 if owners.all() else owners)
    return labels.astype(np.uint8)


def labels_of_colours(mask: np.ndarray, name: str) -> np.ndarray:
    """Colours uint8 [H, W, 3 or 4] -> labels [H, W]: black is 0, others count from 1 in the order of their values."""
    wide = mask[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    colours, labels = np.unique(wide, return_inverse=True)
    if len(colours) > MOST_LABEL:
        raise UserError(
            f"{name} has {len(colours):,} colours, too many for a mask: save masks as PNG, and resize them by nearest "
            f"neighbour"
        )
    return (labels.reshape(wide.shape) + (0 if colours[0] == 0 else 1)).astype(np.uint8)


def _array(value: Any, name: str) -> np.ndarray:
    """An array or tensor as an array; UserError for what is neither."""
    try:
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # bfloat16, which NumPy lacks; lists of unequal length
        array = np.empty(0, object)
    if array.dtype.kind not in "iufb":
        raise UserError(f"{name} is a {type(value).__name__}, expected an array, a tensor or a PIL picture")
    return array
