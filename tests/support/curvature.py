"""The whole Hessian of a tiny model, row by row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.transformer import Transformer


def hessian(model: Transformer, batch: Tensor) -> Tensor:
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits, _ = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    return torch.stack(rows)
