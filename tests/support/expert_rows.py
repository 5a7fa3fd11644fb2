"""How many rows each expert has."""

import torch

COUNTS, FEW = torch.tensor([3.0, 0.0, 6.0, 1.0]), torch.tensor([2.0, 0.0, 1.0])


EXPERT = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2, 3])
