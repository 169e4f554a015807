"""How long a training step takes on one thread and on more, in turns: medians of each round, and the ratios.

    python scripts/step_threads.py sprites-mini --batch 32 --threads 1 2 --rounds 5

Threads wait as those of `fastslots train` do. Beside other programs: `chrt -r 1 python scripts/step_threads.py ...`.
"""

from __future__ import annotations

import argparse
import statistics
import time

from fastslots import threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=25, help="of a round, behind three that are not counted")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    threads.prepare()
    import torch

    from fastslots.config.run import TrainConfig
    from fastslots.distributed import Group
    from fastslots.models import SlotVAE
    from fastslots.train.optim import Optimizers
    from fastslots.train.step import Precision, training_step

    torch.manual_seed(0)
    config = TrainConfig.preset(args.preset, batch_size=args.batch)
    model, group = SlotVAE(config), Group()
    optimizers = Optimizers(model, config.optimizer, config.lr, config.weight_decay)
    precision, side = Precision("fp32", torch.device("cpu")), config.resolution
    images = torch.zeros(args.batch, config.channels, side, side)
    images[:, :, side // 3 :, side // 3 :] = torch.rand(args.batch, config.channels, 1, 1)
    number, medians = 0, {count: [] for count in args.threads}  # type: dict[int, list[float]]
    for _ in range(args.rounds):
        for count in args.threads:
            torch.set_num_threads(count)
            times = []
            for _ in range(3 + args.steps):
                number += 1
                start = time.perf_counter()
                training_step(model, optimizers, precision, config, number, images, group)
                times.append(time.perf_counter() - start)
            medians[count].append(statistics.median(times[3:]))
    one = medians[args.threads[0]]
    for count, seconds in medians.items():
        ratio = statistics.median(a / b for a, b in zip(one, seconds, strict=True))
        of_rounds = " ".join(f"{1000 * s:.2f}" for s in seconds)
        print(f"{count} threads: {1000 * statistics.median(seconds):.2f} ms a step, {ratio:.2f}x ({of_rounds})")


if __name__ == "__main__":
    main()
