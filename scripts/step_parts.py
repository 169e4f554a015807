"""What share of a training step on one CPU thread each part takes: samples by perf, told apart by their call stacks.

    pip install -Ccmake.build-type=RelWithDebInfo -Cinstall.strip=false -e .    # keeps the functions' names
    python scripts/step_parts.py clevr6 --batch 4
    python scripts/step_parts.py sprites-mini --batch 32 --steps 200 --hertz 999

Needs Linux, perf, and leave to look into a process of one's own (`kernel.perf_event_paranoid` at most 1).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

PARTS = [  # the first whose pattern a stack holds
    ("update", r"(?i)muon|::update|adam|multi_tensor|clip"),
    ("encoder: Winograd convolutions", r"winograd"),
    ("encoder: other convolutions", r"Cnn<|convolve|correlate"),
    ("encoder: Transformer of the queries", r"QueryTransformer"),
    (
        "decoder",
        r"Decoder|::decode|forward_layer|backward_layer|feed_forward_backward|attend_backward|attention_backward",
    ),
    ("folding", r"SlotFold"),
    ("draws and seeds", r"draw|Draw|SeedChoice|choose|normal_of"),
    ("encoder: token MLP, norms, GELU", r"Encoder<|EncoderCall|encoder"),
    ("packing, sums, clearing", r"TrainStep|train_step"),
]
OUTSIDE = "PyTorch and Python"
PRODUCT = re.compile(r"(multiply|accumulate|product)_block")
SYSTEM = re.compile(r"asm_exc_page_fault|entry_SYSCALL")


def part_of(stack: list[str]) -> tuple[str, str]:
    """(part, kind of work) of a sample, from its functions, the innermost first."""
    text = "\n".join(stack)
    part = next((name for name, pattern in PARTS if re.search(pattern, text)), OUTSIDE)
    if SYSTEM.search(text):
        return part, "pages and system"
    return part, "products" if any(PRODUCT.search(frame) for frame in stack[:3]) else "other"


def read_stacks(samples: str) -> list[list[str]]:
    """From the text of `perf script -F ip,sym`: one stack a paragraph, a function a line behind its address."""
    paragraphs = [block.splitlines() for block in samples.split("\n\n") if block.strip()]
    return [[line.strip().partition(" ")[2] for line in lines] for lines in paragraphs]


def table(stacks: list[list[str]]) -> str:
    """In Markdown: a part a row, the largest first, in percent of all samples."""
    counts = Counter(part_of(stack) for stack in stacks)
    parts: Counter[str] = Counter()
    for (part, _), number in counts.items():
        parts[part] += number
    rows = ["| part | % of the step | products | pages and system |", "|---|---|---|---|"]
    for part, number in parts.most_common():
        kinds = [f"{100 * counts[part, kind] / len(stacks):.1f}" for kind in ("products", "pages and system")]
        rows.append(f"| {part} | {100 * number / len(stacks):.1f} | {' | '.join(kinds)} |")
    return "\n".join(rows)


def sample(preset: str, batch: int, steps: int, hertz: int, data: Path) -> float:
    """Samples of `steps` steps, on images of one square, into `data` -> seconds of a step, perf's work included."""
    import torch

    from fastslots.config.run import TrainConfig
    from fastslots.models import SlotVAE
    from fastslots.train.optim import Optimizers
    from fastslots.train.step import Precision, training_step

    torch.set_num_threads(1)
    config = TrainConfig.preset(preset)
    model = SlotVAE(config)
    optimizers = Optimizers(model, config.optimizer, config.lr, config.weight_decay)
    precision, side = Precision("fp32", torch.device("cpu")), config.resolution
    images = torch.zeros(batch, 3, side, side)
    images[:, :, : side // 3, : side // 3] = torch.rand(batch, 3, 1, 1)
    for step in (1, 2, 3):
        training_step(model, optimizers, precision, config, step, images)
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(hertz), "--call-graph", "dwarf,8192"]
    recorder = subprocess.Popen([*command, "-o", str(data), "-p", str(os.getpid())])
    time.sleep(1)  # until it is there
    start = time.process_time()
    for step in range(4, 4 + steps):
        training_step(model, optimizers, precision, config, step, images)
    seconds = (time.process_time() - start) / steps
    recorder.send_signal(signal.SIGINT)
    recorder.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--hertz", type=int, default=299)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "samples"
        seconds = sample(args.preset, args.batch, args.steps, args.hertz, data)
        command = ["perf", "script", "-i", str(data), "--no-inline", "-F", "ip,sym"]
        stacks = read_stacks(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{args.preset}, {args.batch} images, one thread: {1000 * seconds:.1f} ms a step, {len(stacks)} samples\n")
    print(table(stacks))


if __name__ == "__main__":
    main()
