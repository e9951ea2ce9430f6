"""What all tests share: one torch thread, the probe environments under their ids, scripts/ to import from."""

import sys
from pathlib import Path

import probes
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
torch.set_num_threads(1)
probes.register()
