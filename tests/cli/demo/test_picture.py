"""The picture of omniops demo."""

import torch

from omniops.cli.demo import picture, training

CPU = torch.device("cpu")


def test_the_kernels_in_the_picture_stand_as_they_are_used():
    """Group 1 takes its upper right neighbour in the lower left of each block of results, and nothing else."""
    contestant = training.make_contestant("CARAFE", CPU, 1, seed=0)
    pack = contestant.network.to_full
    k, s, group, (u, v), (a, b) = pack.up_kernel, pack.scale_factor, 1, (0, 2), (1, 0)
    torch.nn.init.zeros_(pack.content_encoder.weight)
    with torch.no_grad():
        pack.content_encoder.bias.view(pack.up_group, k, k, s, s)[group, u, v, a, b] = 100
    kernels = picture._kernels(contestant, torch.rand(3, 16, 24), CPU)
    expected = torch.full((pack.up_group, 16, 24, k, k), 1 / k**2)
    expected[group, a::s, b::s] = 0
    expected[group, a::s, b::s, u, v] = 1
    torch.testing.assert_close(kernels, expected)
    # And so the operator uses them.
    features = torch.rand(1, pack.channels, 8, 12)
    channels = slice(group * pack.channels // pack.up_group, (group + 1) * pack.channels // pack.up_group)
    out = pack(features)
    torch.testing.assert_close(out[:, channels, a + s :: s, b:-s:s], features[:, channels, :-1, 1:])
