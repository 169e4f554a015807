"""What the documentation prints works: commands parse and, made small, run; links lead somewhere; the site is made."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import MODEL_16, flags

from fastslots.cli import build_parser, main
from fastslots.data import SpritesDataset
from fastslots.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SMALL = flags(MODEL_16 | {"cnn_stride": 1, "batch_size": 4, "threads": 1, "steps": 2, "eval_images": 4})
# What makes a printed command cheap; commands without an entry are parsed alone
CHEAP = {("train",): SMALL, ("eval",): ["--images", "40"], ("report",): [], ("data", "check"): [], ("data", "pack"): []}
ELSEWHERE = ("s3://", "clevrtex", "$", "torchrun")  # not on this machine


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands(text: str) -> list[str]:
    """The fastslots commands of a shell text, each in one line."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in re.split(r"&&|&$", line.split(" #")[0]))
    return [part for part in parts if re.match(r"(torchrun .*-m |python -m )?fastslots ", part)]


def arguments(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("fastslots") + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    text = (ROOT / page).read_text()
    for command in [c for block in blocks(page, "bash") for c in commands(block)]:
        build_parser().parse_args(arguments(command))
    for command in re.findall(r"`(fastslots [a-z][^`]*)`", text):
        try:
            build_parser().parse_args(arguments(command))
        except UserError as error:  # in a sentence a command may be named without what it needs
            assert re.search("are required|expected one argument", str(error)), f"{command}: {error}"
        except SystemExit as stop:  # --help
            assert not stop.code


@pytest.mark.parametrize("page", PAGES)
def test_shell_blocks_are_shell(page):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert not done.returncode, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(commands, blocks(page, "bash")))])
def test_cheap_commands_run(page, tmp_path, monkeypatch):
    """One after another, as printed: data sets and runs that the page takes for granted are made first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    printed = [c for block in blocks(page, "bash") for c in commands(block)]
    cheap = [c for c in printed if not any(word in c for word in ELSEWHERE) and _kind(c)]
    assert (
        main(["data", "generate", "sprites", "clevr_with_masks_train.tfrecords", "--count", "900", "--size", "16"]) == 0
    )
    Path("clevr").mkdir()
    for name in ("1", "2"):  # formats are recognised by content
        with open(f"clevr/{name}.tfrecords", "wb") as file:
            np.savez(file, np.zeros((20, 16, 16, 3), np.uint8))
    if cheap and not any("--out runs/clevr6" in c for c in cheap):
        data = ["--data", "clevr_with_masks_train.tfrecords"]
        assert main(["train", "sprites-mini", *SMALL, *data, "--out", "runs/clevr6"]) == 0
    if any("my-scenes" in c for c in cheap):
        own_scenes(Path("my-scenes"))
    if any("my_model:build" in c for c in cheap):
        Path("my_model.py").write_text(blocks(page, "python")[0])
    for command in cheap:
        assert main([*arguments(command), *CHEAP[_kind(command)]]) == 0, command


def own_scenes(folder: Path) -> None:
    """As docs/data.md asks for: pictures and masks of the same names, in two folders."""
    images, masks, _ = SpritesDataset(0, 24, (2, 3)).scenes(range(40))
    for name, kind, pictures in (("images", "jpg", images), ("masks", "png", masks)):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / name / f"{i:04}.{kind}")


def _kind(command: str) -> tuple[str, ...] | None:
    words = tuple(arguments(command))
    return next((kind for kind in CHEAP if words[: len(kind)] == kind), None)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
            assert not anchor or anchor in map(_anchor, headings), f"{page}: {target}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.skipif(not importlib.util.find_spec("sphinx"), reason="needs Sphinx: pip install 'fastslots[docs]'")
def test_the_site_is_made_as_printed(tmp_path):
    """Every link and heading that a page names is there, and every docstring can be drawn: -W makes warnings errors."""
    command = next(
        line for block in blocks("docs/op.md", "bash") for line in block.splitlines() if "sphinx-build" in line
    )
    words = shlex.split(command)
    assert words == ["sphinx-build", "-W", "docs", "build/site"]
    arguments = ["-q", "-W", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "sphinx", *arguments], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    page = (tmp_path / "reference" / "ops.html").read_text()
    assert "cross_attention" in page and "slot_map" in page and "Raises" in page  # sections of docstrings are read


@pytest.mark.skipif(not importlib.util.find_spec("sphinx"), reason="needs Sphinx: pip install 'fastslots[docs]'")
def test_a_link_that_leads_nowhere_fails_the_site(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    (docs / "index.md").write_text(
        "# Pages\n\n[there](there.md), [heading](#pages), [gone](gone.md)\n\n```{toctree}\nthere\n```\n"
    )
    (docs / "there.md").write_text("# There\n")
    arguments = ["-q", "-W", "--keep-going", str(docs), str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *arguments], capture_output=True, text=True)
    assert done.returncode and "gone.md" in done.stderr and "there.md'" not in done.stderr


def test_pictures_of_scores_are_drawn_and_say_what_they_show(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "docs_pictures.py", tmp_path], check=True)
    for name in ("slots", "j-ari", "jis"):
        drawn, kept = (Image.open(folder / f"what-{name}.png") for folder in (tmp_path, ROOT / "docs"))
        assert drawn.size == kept.size, f"python scripts/docs_pictures.py draws docs/what-{name}.png anew"


@pytest.mark.long
def test_screenshots_are_taken_by_a_script(tmp_path):
    for module in ("pyte", "selenium", "rich"):
        pytest.importorskip(module)
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    few = "--steps 4 --eval_every 2 --eval_images 4".split()
    subprocess.run([sys.executable, ROOT / "scripts" / "docs_screenshots.py", tmp_path, *few], check=True)
    for name in ("report", "report-pages", "terminal"):
        drawn, kept = (Image.open(folder / f"{name}.png") for folder in (tmp_path, ROOT / "docs"))
        assert abs(drawn.width - kept.width) < 40, f"python scripts/docs_screenshots.py takes docs/{name}.png anew"
        assert len(drawn.resize((64, 64)).convert("L").getcolors()) > 8, name
