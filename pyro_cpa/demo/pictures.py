# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The pictures that the demonstration saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..distributions import CPAMarginal
from ..plotting import plot_evidence, plot_generated, plot_latent_map, plot_partition, plot_posterior
from ..plotting.canvas import COLORS, new_figure
from .data import DemoData
from .training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_pictures"]


def save_pictures(folder: Path, data: DemoData, fits: Sequence[Fit], best: Fit) -> dict[str, str]:
    """Draw everything into ``folder``; returns what each file shows."""
    vae = next(fit for fit in fits if fit.name == "VAE")
    generated = _images if data.image_shape else _draws
    pictures = {
        "evidence.png": (_evidence(data, fits), "log p(x) of the training data while each method runs"),
        "partition.png": (
            _partition(data, best),
            f"regions of the decoder ({best.name}), and where the data lie",
        ),
        "posteriors.png": (
            _posteriors(data, vae),
            "true posterior of three test data against the VAE's Gaussian",
        ),
        "generated.png": (generated(data, best), f"what the model generates ({best.name})"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (figure, _) in pictures.items():
        figure.savefig(folder / name, dpi=150)
    return {name: text for name, (_, text) in pictures.items()}


def _evidence(data: DemoData, fits: Sequence[Fit]) -> Figure:
    figure = new_figure(7, 5)
    ax = plot_evidence({fit.name: fit.history for fit in fits}, len(data.train), ax=figure.add_subplot())
    ax.set_title("Exact evidence of the training data")
    return figure


def _partition(data: DemoData, fit: Fit) -> Figure:
    means = fit.exact.posterior(data.train).mean
    reach = 1.05 * float(means.abs().max())
    figure = new_figure(8, 7) if means.shape[1] == 2 else new_figure(9, 4)
    ax = plot_partition(fit.exact.partition(), bounds=(-reach, reach), ax=figure.add_subplot())
    plot_latent_map(means, data.train_labels, label_name="digit", ax=ax)
    ax.set_title(f"{fit.name}: {ax.get_title()}, training data at posterior means")
    return figure


def _posteriors(data: DemoData, vae: Fit) -> Figure:
    """The test rows on which the Gaussian guide loses least, halfway, and most."""
    with torch.no_grad():
        guide = vae.model.encode(data.test)
        z = guide.sample((1000,))
        gaps = (guide.log_prob(z) - vae.exact.posterior(data.test).log_prob(z)).mean(0)
    order = gaps.argsort().tolist()
    chosen = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    figure = new_figure(12.6, 5.2)
    for place, (which, n) in enumerate(chosen.items()):
        ax, row = figure.add_subplot(1, len(chosen), place + 1), data.test[n : n + 1]
        plot_posterior(vae.exact.posterior(row), label="true posterior", ax=ax)
        with torch.no_grad():
            gaussian = vae.model.encode(row)
        plot_posterior(gaussian, filled=False, color=COLORS[1], label="VAE's Gaussian", ax=ax)
        ax.set_title(f"{which} gap: {gaps[n]:.2f} nats", loc="left")
        if data.image_shape:
            picture = ax.inset_axes((0.85, 1.01, 0.15, 0.15), xticks=[], yticks=[])
            picture.imshow(row.reshape(data.image_shape).numpy(), cmap="gray_r")
    figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr,call-arg]
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Three test {data.noun}s under the VAE; lines enclose 50 % and 90 % of the probability")
    return figure


def _images(data: DemoData, fit: Fit) -> Figure:
    two = fit.exact.partition().latent_dim == 2
    figure = new_figure(7, 7.2) if two else new_figure(9, 1.8)
    ends = fit.exact.posterior(data.train).mean.quantile(torch.tensor([0.01, 0.99]).double(), dim=0)
    middle, half = ends.mean(0), float(ends.diff(dim=0).max()) / 2
    ax = plot_generated(
        fit.model.decoder,
        data.image_shape or (1, 1),
        bounds=tuple((float(m) - half, float(m) + half) for m in middle),
        limits=(0, 1),
        ax=figure.add_subplot(),
    )
    ax.set_title(f"{fit.name}: decoder(z) where the data lie")
    return figure


def _draws(data: DemoData, fit: Fit) -> Figure:
    """Test rows beside as many draws from the model, in the first two columns."""
    with torch.no_grad():
        drawn = CPAMarginal(fit.exact.partition(), fit.model.sigma.detach()).sample((len(data.test),))
    figure = new_figure(6, 5)
    ax = figure.add_subplot()
    ax.scatter(data.test[:, 0], data.test[:, 1], s=18, color=COLORS[0], label="test data")
    ax.scatter(
        drawn[:, 0], drawn[:, 1], s=22, color=COLORS[1], marker="x", lw=1, label="drawn from the model"
    )
    ax.set(xlabel=f"{data.names[0]} (scaled)", ylabel=f"{data.names[1]} (scaled)")
    ax.set_title(f"{fit.name}: test data and as many draws")
    ax.legend()
    return figure
