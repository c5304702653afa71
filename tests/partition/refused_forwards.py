# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Modules whose forward is refused, each with what is said about it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(2, 2), nn.ReLU()


class Branching(Layer):
    def forward(self, z):
        return self.layer(z) if z.sum() > 0 else z


class TwoHeads(Layer):
    def forward(self, z):
        return self.layer(z), torch.relu(self.layer(z))


class Swish(Layer):
    def forward(self, z):
        return F.silu(self.layer(z))


class Gate(Layer):
    def forward(self, z):
        h = self.layer(z)
        return h * torch.relu(h)


class Attention(Layer):
    def forward(self, z):
        h = self.layer(z)[:, :, None]
        return torch.matmul(h, h.mT)


class Jump(Layer):
    def forward(self, z):
        return torch.where(self.layer(z) > 0, z, -z)


class Inverse(Layer):
    def forward(self, z):
        return 1 / self.layer(z)


class Constant(Layer):
    def forward(self, z):
        return self.layer.bias


class Noisy(Layer):
    def forward(self, z):
        return self.layer(z) + torch.randn(2)


class Averaged(Layer):
    def forward(self, z):
        return self.layer(z) - self.layer(z).mean(0)


class Counted(Layer):
    def forward(self, z):
        return self.layer(z) / z.shape[0]


class Turned(Layer):
    def forward(self, z):
        return self.layer(z).reshape(-1, 1)


class Overwritten(Layer):
    def forward(self, z):
        h = self.layer(z)
        return F.relu_(h) + h


class OverwrittenView(Layer):
    def forward(self, z):
        h = self.layer(z)
        first = h[:, :1]
        h += z
        return torch.cat([first, h], 1)


class OverwrittenUnasked(Layer):
    def forward(self, z):
        h = self.layer(z)
        h.relu_()
        return h


class OverwrittenInside(Layer):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))

    def forward(self, z):
        h = self.layer(z)
        return h + self.block(h)


class Gathering(Layer):
    def forward(self, *args):
        return self.layer(args[0])


class NotTheLast(Layer):
    def forward(self, z):
        return torch.max(self.layer(z), 1)


class Training(Layer):
    def forward(self, z):
        return F.dropout(self.layer(z), 0.2, self.training)


HERE = r"\(.*refused_forwards\.py, line \d+: "

REFUSED = [
    (
        Branching,
        r"decoder\.0: Branching .* cannot be traced \(symbolically traced.* line \d+: .*z\.sum\(\) > 0",
    ),
    (TwoHeads, r"decoder: Sequential .* must return one tensor that depends on z, not several"),
    (NotTheLast, r"must return one tensor"),
    (Swish, rf"decoder\.0\.forward: silu .* nn\.ReLU or nn\.LeakyReLU\. {HERE}return F\.silu\(self"),
    (Gate, rf"decoder\.0\.forward: mul .* multiplies .* Maxout.* {HERE}return h \* torch\.relu"),
    (Attention, r"matmul .* multiplies"),
    (Jump, r"decoder\.0\.forward: gt .* not continuous"),
    (Inverse, r"truediv .* divide by constants"),
    (Constant, r"decoder: Sequential .* depends on z, not a constant"),
    (Noisy, r"decoder\.0: Noisy .* draws random numbers"),
    (Averaged, r"decoder\.0\.forward: mean .* first dimension"),
    (Counted, r"decoder\.0\.forward: truediv .* how many rows"),
    (Turned, r"decoder\.0\.forward: reshape .* first dimension"),
    (Overwritten, rf"decoder\.0\.forward: relu_ .* overwrites a value that is used again.*{HERE}"),
    (OverwrittenView, r"decoder\.0\.forward: iadd .* h = h \+ x for h \+= x"),
    (OverwrittenUnasked, r"decoder\.0\.forward: relu_ .* overwrites"),
    (OverwrittenInside, r"decoder\.0\.block\.0: ReLU .* overwrites .* without inplace=True"),
    (Gathering, r"decoder\.0: Gathering .* gathers arguments in \*args: name them"),
    (Training, r"decoder\.0\.forward: dropout .* random; .* decoder\.eval\(\)"),
]
