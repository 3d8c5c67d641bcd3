"""For tests that train.

One thread: models this small gain nothing from more, and on a busy machine two can be many times slower. And every
training collects garbage once (accelerate's free_memory), which costs half a second as long as it looks through all
that the libraries have made: so that is taken out of its sight.
"""

import gc

import torch
import trl  # noqa: F401

torch.set_num_threads(1)
gc.freeze()
