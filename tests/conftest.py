"""What all tests share."""

import torch
from hypothesis import settings

# Bit-for-bit comparisons hold for one thread count, and small tests are fastest on one thread.
torch.set_num_threads(1)

# A deadline per example would be a timed assertion.
settings.register_profile("esper", deadline=None)
settings.load_profile("esper")
