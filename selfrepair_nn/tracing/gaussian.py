"""Gaussian numbers that are the same wherever they are drawn, whatever is drawn beside them."""

import torch


def gaussian(seeds, numbers, shape):
    """Standard normal numbers [prompt, …], float64: of a prompt's seed, further numbers and where each stands alone.

    SplitMix64 (Steele, Lea and Flood, 2014) turns these into bits, in integers, so alike on every device; two
    draws of 53 bits make a number (Box and Muller, 1958).
    """
    place = torch.arange(shape[1:].numel(), device=seeds.device) * 2
    state = seeds[:, None]
    for number in numbers:
        state = _mixed(state + number)
    drawn = [((_mixed(_mixed(state) + place + i) >> 11) & (2**53 - 1)).double() for i in (0, 1)]
    radius = (-2 * ((drawn[0] + 0.5) / 2**53).log()).sqrt()
    return (radius * (2 * torch.pi * drawn[1] / 2**53).cos()).view(shape)


def _mixed(x):
    """SplitMix64's step and its mixing, of int64 that wrap around."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
