"""Features of a frozen ViT: the network against its formulas and timm, the folder that keeps them, training on them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastslots.cli import main
from fastslots.config.run import TrainConfig
from fastslots.data import open_dataset, to_float
from fastslots.data.packed.dataset import DatasetInfo
from fastslots.data.packed.features import FeatureDataset, Features, check_features, write_features
from fastslots.data.sources import open_source
from fastslots.errors import UserError
from fastslots.models.vit import load_vit
from fastslots.train import fit

PATCH, WIDTH, HEADS, HIDDEN, DEPTH, GRID = 4, 12, 3, 20, 2, 5
TINY = dict(channels=WIDTH, num_slots=3, slot_dim=4, token_hidden=16, encoder_heads=2, encoder_layers=1)
TINY |= dict(query_width=16, query_hidden=16, slot_width=16, slot_hidden=16, decoder_heads=2, output_hidden=(16,))
TINY |= dict(resolution=GRID, batch_size=4, steps=2, eval_images=3, eval_every=0, threads=1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path_factory.mktemp("cache")))


def weights(seed: int = 0, layer_scale: bool = False) -> dict[str, torch.Tensor]:
    """A random ViT under timm's names; no two sizes coincide."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1] if len(shape) > 1 else 4)

    state = {"patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(WIDTH)}
    state |= {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + GRID**2, WIDTH)}
    state |= {"norm.weight": 1 + draw(WIDTH), "norm.bias": draw(WIDTH), "head.weight": draw(7, WIDTH)}
    for i in range(DEPTH):
        shapes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        shapes |= {"mlp.fc1": (HIDDEN, WIDTH), "mlp.fc2": (WIDTH, HIDDEN)}
        for name, shape in shapes.items():
            state |= {f"blocks.{i}.{name}.weight": draw(*shape), f"blocks.{i}.{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.weight": 1 + draw(WIDTH), f"blocks.{i}.{name}.bias": draw(WIDTH)}
        if layer_scale:
            state |= {f"blocks.{i}.ls1.gamma": draw(WIDTH), f"blocks.{i}.ls2.gamma": draw(WIDTH)}
    return state


def by_formula(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The patch tokens of a plain ViT, written out: an image and a head at a time, in float64."""
    w = {name: value.double() for name, value in state.items()}
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    out = []
    for image in images.double():
        pixels = (image - mean[:, None, None]) / std[:, None, None]
        kernel, patches = w["patch_embed.proj.weight"].flatten(1), []
        for y in range(0, image.shape[1], PATCH):
            for x in range(0, image.shape[2], PATCH):
                patch = pixels[:, y : y + PATCH, x : x + PATCH].flatten()
                patches.append(kernel @ patch + w["patch_embed.proj.bias"])
        x = torch.stack([w["cls_token"][0, 0], *patches]) + w["pos_embed"][0]
        for i in range(DEPTH):
            q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(WIDTH, 1)
            heads = []
            for own in range(0, WIDTH, WIDTH // HEADS):
                part = slice(own, own + WIDTH // HEADS)
                scores = q[:, part] @ k[:, part].T / math.sqrt(WIDTH // HEADS)
                heads.append(scores.softmax(1) @ v[:, part])
            y = linear(torch.cat(heads, 1), f"blocks.{i}.attn.proj")
            x = x + y * w.get(f"blocks.{i}.ls1.gamma", 1)
            hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, f"blocks.{i}.mlp.fc2") * w.get(f"blocks.{i}.ls2.gamma", 1)
        out.append(norm(x, "norm")[1:])
    return torch.stack(out)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "vit.safetensors"
    save_file(weights(), path)
    return path


@pytest.mark.parametrize("layer_scale", [False, True])
def test_the_network_is_its_formulas(tmp_path, layer_scale):
    state = weights(layer_scale=layer_scale)
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH)
    expected = by_formula(state, images)
    for path, save in ((tmp_path / "vit.safetensors", save_file), (tmp_path / "vit.pth", torch.save)):
        save(state, path)
        vit = load_vit(path, HEADS)
        assert not any(p.requires_grad for p in vit.parameters())
        for context in (torch.inference_mode, torch.enable_grad):  # torch's fused block, and its plain one
            with context():
                error = (vit(images) - expected).norm() / expected.norm()
            assert error < 1e-6
    half = load_vit(path, HEADS, "half")(images)
    assert torch.allclose(half, load_vit(path, HEADS)((images - 0.5) / 0.5 * vit.std + vit.mean), atol=1e-5)


@pytest.mark.parametrize("side", [GRID, 3, 8])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_the_network_is_timms(tmp_path, side, layer_scale):
    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        GRID * PATCH, PATCH, num_classes=5, embed_dim=128, depth=2, num_heads=2, init_values=layer_scale,
        dynamic_img_size=True,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    vit = load_vit(tmp_path / "vit.safetensors")
    images = torch.rand(2, 3, side * PATCH, side * PATCH)
    with torch.no_grad():
        expected = theirs.forward_features((images - vit.mean) / vit.std)[:, 1:]
        assert (vit(images) - expected).norm() / expected.norm() < 1e-5


def test_other_networks_are_refused(tmp_path):
    def refused(state: dict[str, torch.Tensor], heads: int = HEADS) -> str:
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(UserError) as error:
            load_vit(tmp_path / "other.safetensors", heads)
        assert "other.safetensors" in str(error.value)
        return str(error.value)

    assert "reg_token" in refused(weights() | {"reg_token": torch.zeros(1, 4, WIDTH)})
    assert "no plain ViT" in refused({"conv1.weight": torch.zeros(3)})
    assert "no class token and a square" in refused(weights() | {"pos_embed": torch.zeros(1, GRID**2 + 5, WIDTH)})
    assert "norm.weight" in refused({n: v for n, v in weights().items() if not n.startswith("norm.")})
    assert "12 is no multiple of 5 heads: set --heads" in refused(weights(), 5)


@pytest.fixture
def made(tmp_path: Path, checkpoint: Path) -> Path:
    """24 scenes at 28 x 28, encoded on a grid of 5 x 5."""
    data, out = tmp_path / "data", tmp_path / "features"
    assert main(["data", "generate", "sprites", str(data), "--count", "24", "--size", "28", "--objects", "2-2"]) == 0
    assert main(features_command(data, checkpoint, out)) == 0
    return out


def features_command(data: Path, checkpoint: Path, out: Path) -> list[str]:
    command = ["data", "features", str(data), "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    return [*command, "--grid", str(GRID), "--size", "28", "--heads", str(HEADS), "--batch-size", "5"]


def test_features_of_a_data_set(made, checkpoint, tmp_path, capsys):
    packed, features = open_dataset(tmp_path / "data"), FeatureDataset(made)
    assert len(features) == 24 and features.info.has_masks and features.info.size == 28
    images, masks = packed.batch(np.array([3, 20]))
    x = torch.nn.functional.interpolate(to_float(torch.from_numpy(images)), (20, 20), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = load_vit(checkpoint, HEADS)(x.clamp(0, 1)).mT.unflatten(2, (GRID, GRID))
    given, given_masks = features.batch(np.array([3, 20]))
    assert given.dtype == np.float16 and np.allclose(given, expected, atol=2e-3)
    assert (given_masks == masks).all()
    item, own = features[20], packed[20]["factors"]
    assert (item["image"] == given[1]).all() and (item["mask"] == masks[1]).all()
    assert item["factors"].keys() == own.keys() and all((item["factors"][name] == own[name]).all() for name in own)

    capsys.readouterr()
    assert main(["data", "check", str(made)]) == 0
    said = capsys.readouterr().out
    assert "features of generated sprites" in said and "12 x 5 x 5" in said and "vit.safetensors" in said
    assert "28 x 28" in said and "train 22, val 1, test 1" in said
    assert main(["data", "check", str(made), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made_by"]["patch"] == PATCH
    assert main(features_command(tmp_path / "data", checkpoint, made)) == 2  # never written over


def test_features_keep_the_split_of_files_and_masks_of_some(tmp_path, checkpoint):
    rng = np.random.default_rng(0)
    (tmp_path / "arrays").mkdir()
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        np.savez(tmp_path / "arrays" / f"clevrtex_{name}.npz", rng.random((count, 3, 28, 28), np.float32))
        if name != "train":
            np.savez(tmp_path / "arrays" / f"clevrtex_{name}_mask.npz", rng.integers(0, 3, (count, 1, 28, 28)))
    assert main(features_command(tmp_path / "arrays", checkpoint, tmp_path / "features")) == 0
    report = check_features(tmp_path / "features")
    assert report.splits == "train 3, val 2, test 1 (as the files are named)"
    features = FeatureDataset(tmp_path / "features")
    assert features.info.parts == (3, 2, 1) and features.objects.tolist() == [255] * 3 + [2] * 3
    given = features.batch(np.arange(6))[1]
    assert (given == open_dataset(tmp_path / "arrays", size=28).batch(np.arange(6))[1]).all() and not given[:3].any()
    config = TrainConfig.preset("clevrtex", **TINY, data=str(tmp_path / "features"))
    assert list(open_source(config).splits["val"].rows) == [3, 4]
    meta = json.loads((tmp_path / "features" / "meta.json").read_text())
    (tmp_path / "features" / "meta.json").write_text(json.dumps(meta | {"parts": [3, 2, 2]}))
    with pytest.raises(UserError, match=r"describes no features .*parts is \[3, 2, 2\], count 6"):
        FeatureDataset(tmp_path / "features")


def test_features_need_no_more_than_python_3_10(tmp_path, checkpoint, monkeypatch):
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # since 3.11
    data, out = tmp_path / "data", tmp_path / "features"
    assert main(["data", "generate", "sprites", str(data), "--count", "3", "--size", "28", "--objects", "2-2"]) == 0
    assert main(features_command(data, checkpoint, out)) == 0
    expected = hashlib.blake2b(checkpoint.read_bytes(), digest_size=16).hexdigest()
    assert FeatureDataset(out).made_by["digest"] == expected


def test_training_and_scores(made, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in TINY.items()]
    assert main(["train", "clevrtex", "--data", str(made), *flags, "--out", str(run)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    capsys.readouterr()
    assert main(["eval", str(run), "--split", "test", "--recombination", "--interaction-order", "--json"]) == 2
    assert "--recombination needs at least two images" in capsys.readouterr().err
    assert main(["eval", str(run), "--split", "test", "--weights", "last", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images_with_masks"] == 1

    # By hand: the Jacobian is shared out among the slots first, then resized to the masks.
    from fastslots.metrics import adjusted_rand_index, fg_ari, slot_jacobian
    from fastslots.models import SlotVAE

    model, dataset = SlotVAE.from_run(run, "last"), FeatureDataset(made)
    features, masks = map(torch.from_numpy, dataset.batch(np.array([22])))  # the test split
    result = model(features.float(), torch.zeros(1, 3, 4))
    share = slot_jacobian(model.decoder, result.slots)
    share = torch.nn.functional.interpolate(share / share.sum(1, keepdim=True), (28, 28), mode="bilinear")
    masks = masks.long()
    j_ari = adjusted_rand_index(masks, share.argmax(1), foreground_only=True).item()
    largest = share.amax(1)[masks > 0].double()
    assert scores["foreground_pixels"] == (masks > 0).sum()
    assert scores["j_ari"] == pytest.approx(j_ari, abs=1e-9)
    assert scores["jis"] == pytest.approx(((largest - 1 / 3) / (2 / 3)).mean().item(), abs=1e-6)
    assert scores["fg_ari"] == pytest.approx(fg_ari(result.slot_map, masks, grid=(GRID, GRID)).item(), abs=1e-9)
    assert scores["recon"] == pytest.approx((result.recon - features.float()).square().sum().item(), rel=1e-5)


def test_a_model_and_its_data_must_fit(made):
    with pytest.raises(UserError, match=r"sprites holds none: make them with `fastslots data features"):
        open_source(TrainConfig.preset("clevrtex"))
    with pytest.raises(UserError, match="holds features of a frozen network: train preset clevrtex"):
        open_source(TrainConfig.preset("sprites", data=str(made)))
    with pytest.raises(UserError, match=r"shape \[12, 5, 5\], the model expects \[768, 5, 5\]"):
        fit(TrainConfig.preset("clevrtex", **TINY | {"channels": 768}, data=str(made)), out=made.parent / "run")
    with pytest.raises(UserError, match="no images are left"):
        open_source(TrainConfig.preset("clevrtex", **TINY, data=str(made), max_objects=1))
    assert main(["data", "check", str(made), "--max_objects", "1"]) == 2


class StoppedError(Exception):
    pass


def test_a_stop_is_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("fastslots.data.packed.features.FLUSH_EVERY", 4)
    source = DatasetInfo("made up", "somewhere", 11, 11, 6, True, False, None, "digest")
    rng = np.random.default_rng(0)
    tokens, masks = rng.normal(size=(11, 9, 5)).astype(np.float32), rng.integers(0, 3, (11, 6, 6)).astype(np.uint8)
    asked: list[int] = []

    def write(out: Path, stop: int | None = None, **made_by: object) -> None:
        def compute(first: int, last: int) -> Features:
            if stop is not None and last > stop:
                raise StoppedError
            asked.append(first)
            return Features(tokens[first:last], masks[first:last], np.full(last - first, 2))

        write_features(out, source, made_by, "float32", compute, lambda: {"x": np.arange(11)}, 2)

    write(tmp_path / "whole")
    asked.clear()
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(StoppedError):
            write(out, stop=6)
    assert not out.exists() and asked == [0, 2, 4, 4]
    asked.clear()
    write(out)
    assert asked == [4, 6, 8, 10]  # four are safe on the disk
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    dataset = FeatureDataset(out)
    assert (dataset.batch(np.arange(11))[0] == tokens.transpose(0, 2, 1).reshape(11, 5, 3, 3)).all()
    dataset.verify()

    shutil.rmtree(out)  # other settings: from the start
    with pytest.raises(StoppedError):
        write(out, stop=6)
    asked.clear()
    write(out, heads=3)
    assert asked[0] == 0


def test_damage_is_named(made, capsys):
    features = made / "features.f16"
    data = features.read_bytes()
    dataset = FeatureDataset(made)
    features.write_bytes(data[:-100] + bytes(100))
    assert main(["data", "check", str(made)]) == 2
    assert "not those that were written" in capsys.readouterr().err
    features.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"features\.f16 has become shorter"):
        dataset.batch(np.array([0]))
    with pytest.raises(UserError, match=r"features\.f16 has 14399 bytes, expected 14400"):
        FeatureDataset(made)
    meta = json.loads((made / "meta.json").read_text())
    (made / "meta.json").write_text(json.dumps(meta | {"side": 0}))
    with pytest.raises(UserError, match="side or channels is out of range"):
        FeatureDataset(made)


def test_clevrtex_as_it_is_published(tmp_path):
    """Pictures and palettes of labels side by side, in numbered folders."""
    rng = np.random.default_rng(0)
    for i, folder in enumerate(("0", "0", "1")):
        (tmp_path / folder).mkdir(exist_ok=True)
        stem = tmp_path / folder / f"CLEVRTEX_full_{i:06d}"
        labels = np.zeros((20, 30), np.uint8)
        labels[2:10, 8:15], labels[0, 0] = i + 1, 9  # the second lies outside the crop
        mask = Image.fromarray(labels)
        mask.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        mask.save(f"{stem}_flat.png")
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(f"{stem}.png")
        if i:
            Path(f"{stem}.json").write_text(json.dumps({"objects": [{}] * 4}))
    dataset = open_dataset(tmp_path)
    assert (dataset.info.kind, len(dataset), dataset.info.size) == ("ClevrTex", 3, 16)  # 0.8 of 20
    assert dataset.objects.tolist() == [2, 4, 4]
    for i, item in enumerate(dataset):
        expected = np.zeros((16, 16), np.uint8)
        expected[:8, 1:8] = i + 1
        assert (item["mask"] == expected).all()
        picture = np.asarray(Image.open(next(tmp_path.glob(f"*/*{i:06d}.png"))))
        assert (item["image"] == picture[2:18, 7:23]).all()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "1" / "CLEVRTEX_full_000002_flat.png")
    with pytest.raises(UserError, match=r"000002_flat\.png is a picture of mode RGB, expected a palette"):
        open_dataset(tmp_path)


def test_features_too_large_for_16_bits_are_refused(tmp_path):
    source = DatasetInfo("made up", "somewhere", 2, 2, 6, False, False, None, "digest")
    tokens = np.array([[[1.0]], [[1e5]]])

    def write(dtype: str) -> None:
        compute = lambda first, last: Features(tokens, None, np.zeros(2))  # noqa: E731
        write_features(tmp_path / "out", source, {}, dtype, compute, dict, 2)

    with pytest.raises(UserError, match="somewhere: image 1 gives features that are not finite: try --dtype float32"):
        write("float16")
    assert not (tmp_path / "out").exists()
    write("float32")
    features, masks = FeatureDataset(tmp_path / "out").batch(np.array([1]))
    assert features.item() == 1e5 and masks is None
