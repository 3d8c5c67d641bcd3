"""One thread: models this small gain nothing from more, and on a busy machine two can be many times slower."""

import torch

torch.set_num_threads(1)
