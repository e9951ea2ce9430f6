"""What all tests share: one torch thread, and the probe environments under their ids."""

import probes
import torch

torch.set_num_threads(1)
probes.register()
