"""Two threads at most, so that a test machine is shared fairly and results do not depend on its size."""

from __future__ import annotations

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
