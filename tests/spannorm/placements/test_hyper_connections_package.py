"""Hyper-connections against another implementation, the package hyper-connections, at the same random weights."""

from typing import Any

import pytest
import torch
from hyper_connections.hyper_connections import HyperConnections
from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections
from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections as ManifoldConstrainedV2
from torch import Tensor

from spannorm import PLACEMENTS, Depth, NormFactory, Placement

DIM, STREAMS, SEQ = 16, 4, 3


def sublayer(x: Tensor) -> Tensor:
    """Mixes features, by the same numbers each time."""
    weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)).to(x)
    return torch.tanh(x @ weight)


def random_placement(name: str, **options: Any) -> Placement:
    placement = PLACEMENTS[name](Depth(1, 2), NormFactory("none", DIM, 1e-14), streams=STREAMS, **options).double()
    for parameter in placement.parameters():
        torch.nn.init.normal_(parameter)
    return placement


def give_static(theirs: Any, mapping: Any) -> None:
    """Copy the biases; theirs says of each old stream what it gives to which new one, ours the other way round."""
    pre, post, res = mapping.bias.split((STREAMS, STREAMS, STREAMS**2))
    theirs.static_alpha.copy_(torch.cat((pre[:, None], res.view(STREAMS, STREAMS).T), 1))
    theirs.static_beta.copy_(post.view_as(theirs.static_beta))


@torch.no_grad()
@pytest.mark.parametrize("start", ["published", "random"])
def test_dynamic_hyper_connections_are_those_of_the_package(start: str) -> None:
    ours = PLACEMENTS["hc"](Depth(1, 2), NormFactory("none", DIM, 1e-14)).double()
    theirs = [HyperConnections(STREAMS, dim=DIM, layer_index=k, tanh=True).double() for k in (0, 1)]
    if start == "random":
        ours = random_placement("hc")
        for other, mapping in zip(theirs, ours.mappings(), strict=True):
            give_static(other, mapping)
            phi, scale = mapping.get_parameter("phi"), mapping.get_parameter("scale")
            other.dynamic_alpha_fn.copy_(torch.stack((phi[0], *phi[2:]), 1))
            other.dynamic_beta_fn.copy_(phi[1])
            other.dynamic_alpha_scale.copy_(scale[0])
            other.dynamic_beta_scale.copy_(scale[1])
    streams = torch.randn(1, SEQ, STREAMS, DIM, dtype=torch.float64)
    state = streams[0].transpose(0, 1)  # theirs: [streams, seq, dim]
    for other in theirs:
        branch, residuals, rest = other.width_connection(state)
        state = other.depth_connection(sublayer(branch), residuals, **rest)
    torch.testing.assert_close(ours(streams, sublayer, sublayer)[0].transpose(0, 1), state, rtol=1e-12, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_constrained_ones_are_those_of_the_package_but_for_what_depends_on_the_token(version: int) -> None:
    """The package reads its coefficients off each stream by itself, and divides rows of res first.

    So without phi, and iterated to the end. Its coefficients are in fp32.
    """
    ours = random_placement("mhc", iterations=200)
    make = ManifoldConstrainedHyperConnections if version == 1 else ManifoldConstrainedV2
    theirs = [make(STREAMS, dim=DIM, layer_index=k, sinkhorn_iters=200).double() for k in (0, 1)]
    for other, mapping in zip(theirs, ours.mappings(), strict=True):
        mapping.get_parameter("phi").zero_()
        give_static(other, mapping)
    streams = torch.randn(1, SEQ, STREAMS, DIM, dtype=torch.float64)
    state = streams[0].transpose(0, 1) if version == 1 else streams
    for other in theirs:
        branch, residuals, rest = other.width_connection(state)
        state = other.depth_connection(sublayer(branch), residuals, **rest)
    found = state.transpose(0, 1) if version == 1 else state[0]
    torch.testing.assert_close(ours(streams, sublayer, sublayer)[0], found, rtol=1e-5, atol=1e-5)
