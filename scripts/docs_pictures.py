"""Draws the pictures of docs/slots-and-scores.md with the model that ships: python scripts/docs_pictures.py [FOLDER].

Every number in a picture is computed for the scene beside it. The same model draws the same pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastslots.data import to_float
from fastslots.data.sources import open_source
from fastslots.metrics import jacobian_ari, jacobian_interaction_score, slot_jacobian
from fastslots.models import SlotVAE
from fastslots.models.jacobian import slot_share
from fastslots.report.pictures import by_colour, grey, labels, rgb
from fastslots.runs.folder import RunFolder
from fastslots.runs.pretrained import run_folder

SIDE, GAP, HEAD, FOOT = 192, 12, 26, 26
SCENES = 200  # of the test split, among which clear examples are chosen

Tile = tuple[str, np.ndarray, str]  # what it is, uint8 [R, R, 3], what was computed of it


def row(tiles: list[Tile]) -> Image.Image:
    """Pictures side by side, each with a line above and one below."""
    page = Image.new("RGB", (len(tiles) * (SIDE + GAP) + GAP, HEAD + SIDE + FOOT), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for i, (above, picture, below) in enumerate(tiles):
        x = GAP + i * (SIDE + GAP)
        draw.text((x, 4), above, "black", font)
        page.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, HEAD))
        draw.text((x, HEAD + SIDE + 4), below, "black", font)
    return page


def column(rows: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, picture in enumerate(rows):
        page.paste(picture, (0, sum(r.height for r in rows[:i])))
    return page


def shares_of(jacobian: Tensor) -> Tensor:
    """Each slot's share of one scene's pixels: [K, R, R] -> the same, summing to 1 over K."""
    return slot_share(jacobian[None])[0]


class Scenes:
    """Test scenes, and what the model that ships makes of them."""

    def __init__(self, name: str):
        self.model = SlotVAE.from_pretrained(name)
        split = open_source(RunFolder(run_folder(name)).read_config()).splits["test"][:SCENES]
        pixels, masks = split.read()
        self.images = to_float(pixels)
        assert masks is not None, "the built-in scenes have masks"
        self.masks = masks
        with torch.no_grad():
            self.slots = self.model.encode(self.images).mean  # [B, K, D]
            self.recon = self.model.decoder(self.slots)[0]
        self.jacobian = slot_jacobian(self.model.decoder, self.slots)  # [B, K, R, R]
        self.j_ari = torch.tensor([self.score(i, self.jacobian[i]) for i in range(len(self.images))])

    def clear(self) -> list[int]:
        """Scenes of three objects, each of which has a slot."""
        three = self.masks.amax((1, 2)) == 3
        return torch.where((self.j_ari > 0.99) & three)[0].tolist()

    def score(self, i: int, jacobian: Tensor) -> float:
        return jacobian_ari(jacobian[None], self.masks[i][None])

    def on_objects(self, i: int, shares: Tensor) -> np.ndarray:
        """Slots by colour, where the scene has an object; the ground, which J-ARI leaves out, is dark."""
        return np.where((self.masks[i].numpy() > 0)[..., None], by_colour(shares), np.uint8(24))


def slots_picture(scenes: Scenes) -> Image.Image:
    """What a slot is: one is exchanged for another scene's, and the picture changes where that slot shows."""
    first, second = scenes.clear()[:2]
    share = shares_of(scenes.jacobian[first])
    slot = int((share.argmax(0)[scenes.masks[first] == 1]).mode().values)  # that of the scene's first object
    other = int((shares_of(scenes.jacobian[second]).argmax(0)[scenes.masks[second] == 1]).mode().values)
    slots = scenes.slots[first].clone()
    slots[slot] = scenes.slots[second, other]
    with torch.no_grad():
        changed = scenes.model.decoder(slots[None])[0][0]
    moved = (changed - scenes.recon[first]).abs().amax(0)
    return row(
        [
            ("a scene", rgb(scenes.images[first]), "goes in"),
            ("decoded from its slots", rgb(scenes.recon[first]), "comes out"),
            ("whose pixels are whose", by_colour(share), "each slot a colour"),
            ("one slot exchanged", rgb(changed), "for another scene's"),
            ("what that changed", grey(moved / moved.max()), "brighter: more"),
        ]
    )


def j_ari_picture(scenes: Scenes) -> Image.Image:
    """One scene, three ways to share its objects out among slots."""
    R = scenes.masks.shape[-1]
    y, x = torch.meshgrid(torch.arange(R), torch.arange(R), indexing="ij")
    quarters = torch.nn.functional.one_hot((y >= R // 2) * 2 + (x >= R // 2), 4).permute(2, 0, 1).float()
    i = min(scenes.clear(), key=lambda scene: scenes.score(scene, quarters))
    mask = scenes.masks[i]
    merged = torch.nn.functional.one_hot((mask == 1).long(), 4).permute(2, 0, 1).float()
    tiles: list[Tile] = [("a scene", rgb(scenes.images[i]), ""), ("its true objects", labels(mask.numpy()), "")]
    for title, jacobian in (
        ("slots of the model", scenes.jacobian[i]),
        ("two objects in a slot", merged),
        ("slots as quarters", quarters),
    ):
        shares = shares_of(jacobian)
        tiles.append((title, scenes.on_objects(i, shares), f"J-ARI {scenes.score(i, jacobian):.2f}"))
    return row(tiles)


def jis_picture(scenes: Scenes) -> Image.Image:
    """The same owner of every pixel, alone or with others: J-ARI does not see the difference, JIS does."""
    i = scenes.clear()[3]
    share = shares_of(scenes.jacobian[i])
    rows = []
    for title, shares in (("as the model is", share), ("half of it spread", 0.5 * share + 0.5 / len(share))):
        tiles: list[Tile] = [(title, scenes.on_objects(i, shares), f"J-ARI {scenes.score(i, shares):.2f}")]
        tiles.append(
            (
                "the strongest's share",
                grey(shares.amax(0) * (scenes.masks[i] > 0)),
                f"JIS {jacobian_interaction_score(shares[None], scenes.masks[i][None]):.2f}",
            )
        )
        rows.append(row([("a scene", rgb(scenes.images[i]), ""), *tiles]))
    return column(rows)


def main(folder: Path) -> None:
    scenes = Scenes("sprites-mini")
    for name, draw in (("slots", slots_picture), ("j-ari", j_ari_picture), ("jis", jis_picture)):
        draw(scenes).save(folder / f"what-{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
