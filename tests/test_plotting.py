# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures show what they claim: cells, credible regions, tiles and curves are read back off the axes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_cpa.criticism import compare
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import CPAError, InvalidData
from pyro_cpa.infer.exact_fit import StepRecord
from pyro_cpa.infer.thermodynamic_curve import TVOCurve
from pyro_cpa.partition import enumerate_regions
from pyro_cpa.plotting import (
    plot_comparison,
    plot_evidence,
    plot_generated,
    plot_integrand,
    plot_latent_map,
    plot_partition,
    plot_posterior,
)
from pyro_cpa.plotting.canvas import new_axes
from pyro_cpa.plotting.posterior import highest_density_levels


def relu_net(*widths):
    layers = []
    for below, above in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def named(ax):
    return bool(ax.get_xlabel()) and (bool(ax.get_ylabel()) or not len(ax.get_yticks()))


def area(corners):
    x, y = corners[:, 0], corners[:, 1]
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


class TestPartition:
    def test_drawn_cells_tile_the_window_and_are_the_cells(self):
        partition = enumerate_regions(relu_net(2, 7, 5, 3))
        ax = plot_partition(partition, bounds=((-2.0, 3.0), (-1.0, 1.5)))
        shapes = [path.vertices[:-1] for path in ax.collections[0].get_paths()]
        assert sum(area(s) for s in shapes) == pytest.approx(5.0 * 2.5, rel=1e-10)
        regions = [int(partition.locate(torch.as_tensor(s.mean(0)))) for s in shapes]
        assert len(set(regions)) == len(regions)

    def test_drawn_intervals_tile_the_window(self):
        ax = plot_partition(enumerate_regions(relu_net(1, 9, 3)), bounds=(-0.5, 2.0))
        assert sum(patch.get_width() for patch in ax.patches) == pytest.approx(2.5, rel=1e-12)

    @pytest.mark.parametrize("latent_dim", [1, 2])
    def test_a_linear_decoder_fills_the_window(self, latent_dim):
        ax = plot_partition(enumerate_regions(nn.Linear(latent_dim, 3)), bounds=(-1.0, 1.0))
        if latent_dim == 1:
            (patch,) = ax.patches
            assert (patch.get_x(), patch.get_width()) == (-1.0, 2.0)
        else:
            (path,) = ax.collections[0].get_paths()
            assert area(path.vertices[:-1]) == 4.0

    @pytest.mark.parametrize("latent_dim", [1, 2])
    def test_every_cell_in_view_is_drawn(self, latent_dim):
        partition = enumerate_regions(relu_net(latent_dim, 6, 3))
        ax = plot_partition(
            partition, bounds=(-50.0, 50.0), values=torch.arange(float(partition.num_regions))
        )
        assert named(ax) and ax.get_xlim() == (-50.0, 50.0)
        drawn = len(ax.patches) if latent_dim == 1 else len(ax.collections[0].get_paths())
        assert drawn == partition.num_regions
        assert ax.get_title() == f"{drawn} regions"

    def test_cells_out_of_view_are_counted(self):
        ax = plot_partition(enumerate_regions(relu_net(2, 6, 3)), bounds=(100.0, 100.1))
        assert " of " in ax.get_title() and "in view" in ax.get_title()

    def test_refusals(self):
        partition = enumerate_regions(relu_net(2, 3, 3))
        with pytest.raises(InvalidData, match="bounds"):
            plot_partition(partition, bounds=(1.0, -1.0))
        with pytest.raises(InvalidData, match="values has shape"):
            plot_partition(partition, values=torch.zeros(2))
        with pytest.raises(InvalidData, match="latent dimension 3"):
            plot_partition(enumerate_regions(nn.Linear(3, 4)))


class TestPosterior:
    def test_thresholds_are_those_of_a_gaussian(self):
        """In the plane, N(0, I) has density (1 - p) / 2 pi at the border of the region of probability p."""
        n, levels = 40_000, np.array([0.5, 0.9])
        normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        found = highest_density_levels(normal.log_prob(normal.sample((n,))), levels)
        # Minus the log-density is an exponential variable plus a constant: standard error of its p-quantile.
        error = np.sqrt(levels / (1 - levels) / n)
        assert (np.abs(found - np.log((1 - levels) / (2 * np.pi))) < 5 * error).all()

    def test_a_region_encloses_its_probability_of_the_exact_posterior(self):
        """An exact posterior on the line, kinks and all: the shaded stretch holds its probability."""
        px = CPAMarginal(relu_net(1, 8, 2), 0.5)
        ax = plot_posterior(px, px.sample(), levels=(0.5,))
        z, density = ax.lines[0].get_data()
        lengths = np.gradient(z)
        assert (density * lengths).sum() == pytest.approx(1.0, abs=0.01)
        (shade,) = ax.collections
        inside = np.array([any(path.contains_point((a, 1e-9)) for path in shade.get_paths()) for a in z])
        # Quantile of 4000 draws (standard error 0.008) and the grid's resolution.
        assert (density * lengths)[inside].sum() == pytest.approx(0.5, abs=5 * 0.008 + 0.01)

    def test_the_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        plot_posterior(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        assert torch.equal(before, torch.get_rng_state())

    def test_two_posteriors_share_axes_and_legend(self):
        narrow, wide = (dist.Normal(torch.zeros(2), s).to_event(1) for s in (0.2, 2.0))
        ax = plot_posterior(narrow, label="narrow")
        small = ax.get_xlim()
        plot_posterior(wide, filled=False, label="wide", ax=ax)
        assert ax.get_xlim()[1] > small[1]
        large = ax.get_xlim()
        plot_posterior(narrow, ax=ax)
        assert ax.get_xlim() == large
        assert named(ax) and [t.get_text() for t in ax.legend().get_texts()] == ["narrow", "wide"]

    def test_bounds_are_obeyed(self):
        ax = plot_posterior(dist.Normal(torch.zeros(2), 1.0).to_event(1), bounds=((-1.0, 2.0), (0.0, 1.0)))
        assert (ax.get_xlim(), ax.get_ylim()) == ((-1.0, 2.0), (0.0, 1.0))

    def test_refusals(self):
        with pytest.raises(InvalidData, match="one latent vector"):
            plot_posterior(dist.Normal(torch.zeros(5, 2), 1.0).to_event(1))
        with pytest.raises(InvalidData, match="latent dimension 3"):
            plot_posterior(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pytest.raises(InvalidData, match="levels"):
            plot_posterior(dist.Normal(torch.zeros(1), 1.0).to_event(1), levels=(90,))
        with pytest.raises(InvalidData, match="give the datum"):
            plot_posterior(CPAMarginal(nn.Linear(1, 2), 1.0))


class TestLatent:
    @pytest.mark.parametrize("latent_dim", [1, 2])
    def test_every_datum_is_drawn_in_its_class(self, latent_dim):
        means, labels = torch.randn(30, latent_dim), torch.arange(30) % 4
        ax = plot_latent_map(means, labels, label_name="digit")
        assert named(ax)
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2", "3"]
        for label, points in enumerate(ax.collections):
            assert np.allclose(points.get_offsets()[:, 0], means[labels == label, 0])

    def test_classes_may_be_words_or_numbers_or_absent(self):
        means = torch.randn(25, 2)
        assert len(plot_latent_map(means, ["a", "b"] * 12 + ["a"]).collections) == 2
        assert len(plot_latent_map(means).collections) == 1
        ax = plot_latent_map(means, torch.rand(25), label_name="weight (kg)")
        assert ax.figure.axes[1].get_ylabel() == "weight (kg)"

    def test_two_coordinates_of_many(self):
        means = torch.randn(25, 5)
        ax = plot_latent_map(means, coordinates=(3, 1))
        assert np.allclose(ax.collections[0].get_offsets(), means[:, [3, 1]])
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent $z_4$", "latent $z_2$")
        with pytest.raises(InvalidData, match="latent dimension 5: expected 1 or 2.*coordinates=\\(0, 1\\)"):
            plot_latent_map(means)
        for coordinates in ((0, 5), (2, 2), (-1, 0)):
            with pytest.raises(InvalidData, match="two different numbers from 0 to 4"):
                plot_latent_map(means, coordinates=coordinates)

    def test_over_a_partition_the_window_stays(self):
        ax = plot_partition(enumerate_regions(relu_net(2, 3, 3)), bounds=(-2.0, 2.0))
        plot_latent_map(10 * torch.randn(9, 2), ax=ax)
        assert ax.get_xlim() == ax.get_ylim() == (-2.0, 2.0)

    def test_tiles_show_the_decoder_at_their_centres(self):
        decoder = relu_net(2, 5, 6)
        ax = plot_generated(decoder, (2, 3), bounds=((-1.0, 1.0), (0.0, 4.0)), steps=4)
        (image,) = ax.images
        left, right, bottom, top = image.get_extent()
        shown = np.asarray(image.get_array())
        for z in ((-0.75, 0.5), (0.25, 3.5), (0.75, 0.5)):
            column = int((z[0] - left) / (right - left) * 4)
            row = int((top - z[1]) / (top - bottom) * 4)
            tile = shown[4 * row + 1 : 4 * row + 3, 5 * column + 1 : 5 * column + 4]
            assert np.allclose(tile, decoder(torch.tensor(z)).detach().reshape(2, 3), rtol=1e-12)
        assert named(ax)

    def test_tiles_of_a_line(self):
        decoder = relu_net(1, 5, 6)
        ax = plot_generated(decoder, (2, 3), bounds=(-1.0, 1.0), steps=4)
        shown = np.asarray(ax.images[0].get_array())
        assert np.allclose(shown[1:3, 6:9], decoder(torch.tensor([-0.25])).detach().reshape(2, 3), rtol=1e-12)
        assert named(ax)

    def test_refusals(self):
        with pytest.raises(InvalidData, match="12 pixels: the decoder makes 6"):
            plot_generated(relu_net(2, 3, 6), (3, 4))
        with pytest.raises(InvalidData, match="expected \\(N, L\\)"):
            plot_latent_map(torch.randn(4))
        with pytest.raises(InvalidData, match="one for each of the 4 data"):
            plot_latent_map(torch.randn(4, 2), [0, 1])
        with pytest.raises(InvalidData, match="30 different classes"):
            plot_latent_map(torch.randn(30, 2), torch.arange(30))


class TestCurves:
    def test_evidence_per_datum_against_seconds_and_steps(self):
        records = [StepRecord(-10.0 + i, -10.0 + i, 1.0, 0.5) for i in range(4)]
        ax = plot_evidence({"EM": records, "VAE": ([0.0, 3.0], [-20.0, -8.0])}, num_data=2)
        assert np.allclose(ax.lines[0].get_data(), [[0.5, 1.0, 1.5, 2.0], [-5.0, -4.5, -4.0, -3.5]])
        assert np.allclose(ax.lines[1].get_data(), [[0.0, 3.0], [-10.0, -4.0]])
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["EM", "VAE"]
        assert named(ax) and "(s)" in ax.get_xlabel() and "(nats)" in ax.get_ylabel()
        steps = plot_evidence({"EM": records}, against="steps")
        assert np.allclose(steps.lines[0].get_xdata(), [1, 2, 3, 4])

    def test_evidence_refusals(self):
        with pytest.raises(InvalidData, match="histories is empty"):
            plot_evidence({})
        with pytest.raises(InvalidData, match="history of 'VAE'"):
            plot_evidence({"VAE": ([0.0], [1.0, 2.0])})
        with pytest.raises(InvalidData, match="against"):
            plot_evidence({"VAE": ([0.0], [1.0])}, against="epochs")

    def test_integrand(self):
        betas = torch.linspace(0, 1, 5)
        curve = TVOCurve(betas, betas - 3.0, betas, betas, 0.1 * betas, betas[::2], betas[::2] - 3.0)
        ax = plot_integrand(curve)
        assert np.allclose(ax.lines[0].get_data(), [betas, betas - 3.0])
        assert named(ax) and "(nats)" in ax.get_ylabel()

    def test_comparison_shows_differences_best_on_top(self):
        fits = {f"sd {s}": dist.Normal(torch.zeros(1), s).to_event(1) for s in (3.0, 1.0)}
        table = compare(fits, torch.randn(50, 1))
        ax = plot_comparison(table)
        assert [t.get_text().split("\n")[0] for t in ax.get_yticklabels()] == ["sd 1.0", "sd 3.0"]
        marks = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert np.allclose(marks, sorted(table.difference, reverse=True))
        assert ax.yaxis_inverted() and "(nats)" in ax.get_xlabel()


def test_no_window_and_no_backend():
    code = """
import sys, torch
from pyro_cpa.partition import enumerate_regions
from pyro_cpa.plotting import plot_partition
import io
plot_partition(enumerate_regions(torch.nn.Linear(2, 3))).figure.savefig(io.BytesIO())
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CPAError, match=r"pip install pyro-cpa\[plot\]"):
        plot_partition(enumerate_regions(nn.Linear(2, 3)))


def test_given_axes_are_returned():
    ax = new_axes(None)
    assert new_axes(ax) is ax
    assert plot_evidence({"a": ([0.0, 1.0], [0.0, 1.0])}, ax=ax) is ax
