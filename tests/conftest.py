"""What all tests share."""

import torch

# Bit-for-bit comparisons hold for one thread count, and small tests are fastest on one thread.
torch.set_num_threads(1)
