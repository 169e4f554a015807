"""Which images train, which validate, which test: stated once, printed and stored by every run."""

from __future__ import annotations

from dataclasses import dataclass

# The authors' arrays, in file order (arXiv 2411.07784): images in all -> (train, val, test)
PUBLISHED = {100_000: (90_000, 5_000, 5_000), 53_483: (49_483, 2_000, 2_000)}
FEW = 20


@dataclass(frozen=True)
class Splits:
    train: range
    val: range
    test: range
    note: str

    def __str__(self) -> str:
        return f"train {len(self.train)}, val {len(self.val)}, test {len(self.test)} ({self.note})"


def split_indices(n: int, published: bool = False, parts: tuple[int, int, int] | None = None) -> Splits:
    """Ranges of n images in file order.

    published: the authors' npz, split as they do where the count is theirs. parts: images of train, val and test, one
    after another, where files, folders or lists are named so; without test, val is tested on too, and without val the
    last 5 % of train are. Any other set: the last 5 % is val, the 5 % before it test, at least one image each; under 20
    images, evaluation uses the training images.
    """
    if parts:
        return _named(n, *parts)
    if published and n in PUBLISHED:
        train, val, _ = PUBLISHED[n]
        return Splits(range(train), range(train, train + val), range(train + val, n), "the published split")
    if n < FEW:
        everything = range(n)
        return Splits(everything, everything, everything, f"under {FEW} images: evaluation uses the training images")
    held = _share(n)
    return Splits(
        range(n - 2 * held), range(n - held, n), range(n - 2 * held, n - held), "last 5 % val, 5 % before test"
    )


def _named(n: int, train: int, val: int, test: int) -> Splits:
    if val and test:
        return Splits(range(train), range(train, train + val), range(train + val, n), "as the files are named")
    if val:
        note = "as the files are named; no test images are, so that test is val"
        return Splits(range(train), range(train, n), range(train, n), note)
    first = train - _share(train)
    note = "as the files are named; no validation images are, so that val is the last 5 % of train"
    return Splits(range(first), range(first, train), range(train, n), note)


def _share(n: int) -> int:
    return max(1, n * 5 // 100)
