# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every script under ``benchmarks`` runs, and the pages that they write hold the figures of their tables."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from warm_python import run_warm

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.name
    for path in (ROOT / "benchmarks").glob("*.py")
    if "\nif __name__ ==" in path.read_text() and path.name != "results_page.py"
)
# What a script must be told besides --smoke.
ARGUMENTS = {"models.py": ["--all"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script, tmp_path):
    folder = tmp_path / "benchmarks"  # a copy, so that results do not land in the repository
    folder.mkdir()
    for path in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(path, folder)
    done = run_warm(
        str(folder / script),
        *ARGUMENTS.get(script, []),
        "--smoke",
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def side_by_side():
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "benchmarks/renyi_side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_holds_every_table_and_no_other_figures():
    script = side_by_side()
    page = script.PAGE.read_text()
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end (\w+) -->", page, flags=re.DOTALL)
    assert [name for name, _, _ in tables] == [end for _, _, end in tables] == list(script.TABLES)
    assert all(text.startswith("| ") for _, text, _ in tables)
    prose = re.sub(r"<!-- (\w+) -->\n.*?<!-- end \1 -->", "", page, flags=re.DOTALL)
    assert not re.search(r"\d\.\d\d|±", prose)


def test_tables_are_inserted_between_their_markers():
    script = side_by_side()
    page = "a\n<!-- t -->\nold\n<!-- end t -->\nb\n"
    assert script.insert(page, "t", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="0 places"):
        script.insert(page, "other", "new")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_results_page_shows_the_results(script):
    """Otherwise: python benchmarks/results_page.py."""
    assert (ROOT / "benchmarks/RESULTS.md").read_text() == script("results_page").page()


def test_references_are_numbers_with_a_source():
    with open(ROOT / "benchmarks/references.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["value"]) is not None for row in rows)
    known = {"paper", "authors' stored run", "replication", "recollection"}
    assert {row["source"] for row in rows} <= known
    keys = [(row["table"], row["row"], row["quantity"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_a_reference_is_cited_with_its_epochs_where_they_are_known(script):
    cited = script("results_page").cited
    assert cited({"value": "0.83", "source": "paper", "epochs": "78"}) == "0.83 (paper, 78 epochs)"
    assert cited({"value": "-90.5", "source": "replication", "epochs": ""}) == "-90.5 (replication)"


@pytest.fixture
def section(script, tmp_path, monkeypatch):
    """The lines of a table's section, from its results and the references {(row, quantity): value}."""
    page = script("results_page")
    monkeypatch.setattr(page, "HERE", tmp_path)
    (tmp_path / "results").mkdir()

    def lines(name, results, theirs):
        (tmp_path / f"results/{name}.csv").write_text(results)
        references = [
            {"table": name, "row": row, "quantity": quantity, "value": value, "source": "paper", "epochs": ""}
            for (row, quantity), value in theirs.items()
        ]
        (table,) = [table for table in page.TABLES if table.name == name]
        return page.section(table, references)

    return lines


def test_page_says_where_we_are_behind(section):
    lines = section(
        "helmholtz",
        'data set,objective,x,-log p,"-log p, training rows",-log p*,epochs,training CPU s\n'
        "DNA,BiHM,bernoulli,90.0 +- 0.3,87.5 +- 0.1,80.0,7,60\n"
        "ADULT,BiHM,bernoulli,13.0 +- 0.3,12.5 +- 0.1,80.0,7,60\n",
        {("DNA BiHM", "-log p"): "86.5", ("DNA BiHM", "-log p*"): "86.5", ("ADULT BiHM", "-log p"): "12.7"},
    )
    adult, dna = [line for line in lines if line.startswith("- ")]
    assert "DNA, bernoulli, BiHM: -log p is 90, 3.50 behind 86.5 (paper), after 7 epochs and 60 s" in dna
    assert dna.endswith(": training rows are at 87.5, behind as well: it is the fit that lacks.")
    assert adult.endswith(
        ": within two standard errors; training rows are at 12.5: 0.50 are lost from there to the test rows."
    )


def test_page_says_which_orders_of_the_references_hold(section):
    theirs = {"TVO S=5": "-89.9", "IWAE S=5": "-88.45", "DReG S=5": "-88.1", "DReG S=10": "-87.85"}
    lines = section(
        "discrete_mnist",
        "model,objective,S,seed,log p,s.e.,epochs,updates,training CPU s\n"
        "vae,TVO,5,0,-100.0,1,1,40000,9\nvae,IWAE,5,0,-101.0,1,1,40000,9\nvae,DReG,5,0,-99.0,1,1,40000,9\n"
        "vae,DReG,10,0,-98.0,6,1,40000,9\nvae,TVO,5,0,-95.0,1,2,80000,9\n",
        {(f"vae {row}", "log p"): value for row, value in theirs.items()},
    )
    assert [line.split(" (")[0] for line in sorted(lines) if "ahead of" in line] == [
        "- vae DReG S=5 ahead of vae IWAE S=5 in log p: holds after 40000 updates",
        "- vae DReG S=5 ahead of vae TVO S=5 in log p: holds after 40000 updates",
        "- vae IWAE S=5 ahead of vae TVO S=5 in log p: does not hold after 40000 updates",
    ]
    behind = [line for line in lines if line.endswith(" % of the updates of the reference.")]
    assert len(behind) == 4
    assert sum(line.endswith(": 1 % of the updates of the reference.") for line in behind) == 2
    (dreg,) = (line for line in behind if ", DReG, 10" in line)
    assert dreg.endswith(": within two standard errors; 1 % of the updates of the reference.")
    (tvo,) = (line for line in behind if ", TVO, 5" in line)  # the later of its two figures
    assert "log p is -95" in tvo and "2 epochs" in tvo and ": 2 % of" in tvo


def test_runs_are_compared_row_by_row(script):
    """A difference of rows has a smaller error than the rows have."""
    benchmark = script("discrete_mnist")
    keys = [("vae", objective, "5", "0", "100") for objective in ("TVO", "IWAE")]
    keys += [("sbn", "TVO", "5", "0", "100"), ("vae", "TVO", "5", "0", "200")]
    rows = [dict(zip(benchmark.KEYS, key, strict=True)) for key in keys]
    texts = ["-100 -50 -10", "-103 -51 -12", "-1 -2 -3", "-90 -40 -9"]
    singles = {key: {"log p of the test rows": text} for key, text in zip(keys, texts, strict=True)}
    found = benchmark.to_the_best(rows, singles)
    assert [row["to the best"] for row in found] == ["", "-2.000 +- 0.577", "", ""]


def test_runs_are_compared_at_the_end_of_the_cheapest(script):
    """By costs measured side by side; a run whose cost is not known has no time."""
    benchmark = script("discrete_mnist")
    keys = [("vae", objective, "5", "0", "300") for objective in ("TVO", "DReG", "BiHM")]
    rows = [dict(zip(benchmark.KEYS, key, strict=True)) for key in keys]
    points = [
        row | {"updates": updates, "log p": f"-{updates}"}
        for row in rows
        for updates in ("100", "200", "300")
    ]
    costs = {("vae", "TVO", "5"): {benchmark.COST: "10"}, ("vae", "DReG", "5"): {benchmark.COST: "14"}}
    found = benchmark.equal_time(benchmark.costed(rows, costs), benchmark.costed(points, costs))
    assert [row[benchmark.TIME] for row in found] == ["3.0", "4.2", ""]
    assert [row["at equal CPU time"] for row in found] == [
        "-300 after 300 updates",
        "-200 after 200 updates",
        "",
    ]


def test_densities_of_a_black_pixel(script):
    """The reference's density saturates, the library's does not: what the page says of their heights."""
    models = script("models")
    x, logits = torch.tensor([[0.002], [-500.0]], dtype=torch.float32)
    saturating = models.SaturatingContinuousBernoulli()(logits).log_prob(x).item()
    assert saturating == pytest.approx(2.74, abs=0.005)
    assert models.ContinuousBernoulli()(logits).log_prob(x).item() == pytest.approx(5.21, abs=0.005)


def test_exclusive_columns_are_a_distribution(script):
    """Probabilities of all allowed rows sum to one; groups of one column are independent Bernoulli entries."""
    columns = script("exclusive_columns")
    x = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]])
    groups = columns.exclusive_groups(x)
    assert groups.tolist() == [[0, 1, 2], [3, 5, 5], [4, 5, 5]]
    logits = torch.randn(5)
    law = columns.ExclusiveColumns(logits, groups)
    rows = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    allowed = rows[rows[:, :3].sum(1) <= 1]
    log_p = law.log_prob(allowed)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    draws = law.sample((20_000,))
    assert draws[:, :3].sum(1).max() == 1
    mean = (log_p.exp()[:, None] * allowed).sum(0)
    error = (mean * (1 - mean) / len(draws)).sqrt()
    assert bool(((draws.mean(0) - mean).abs() < 5 * error).all())
    high = columns.ExclusiveColumns(logits + 90, groups).log_prob(allowed)  # by another route
    assert torch.allclose(high.exp().sum(), torch.ones(()), atol=1e-12)
    single = columns.ExclusiveColumns(logits, torch.arange(5)[:, None])
    bernoulli = torch.distributions.Bernoulli(logits=logits).log_prob(rows).sum(1)
    assert torch.allclose(single.log_prob(rows), bernoulli, atol=1e-12)


def test_autoregressive_columns_are_a_distribution(script):
    """Probabilities of all rows sum to one and are the draws' frequencies; without weights: Bernoulli entries."""
    columns = script("autoregressive_columns")
    rows = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    logits, weight = torch.randn(4), 2 * torch.randn(4, 4)
    law = columns.AutoregressiveColumns(logits, weight)
    p = law.log_prob(rows).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-12)
    draws = law.sample((20_000,))
    counts = torch.bincount((draws @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), minlength=16) / len(draws)
    assert bool(((counts - p).abs() < 5 * (p * (1 - p) / len(draws)).sqrt()).all())
    last = torch.sigmoid(logits[3] + rows[:, :3] @ weight[:3, 3])  # of entry 3 given the others, by hand
    on = p[rows[:, 3] == 1] / (p[rows[:, 3] == 1] + p[rows[:, 3] == 0])
    assert torch.allclose(on, last[rows[:, 3] == 1], atol=1e-12)
    batch = columns.AutoregressiveColumns(torch.randn(3, 1, 4), weight)  # particles, rows
    assert batch.sample().shape == (3, 1, 4)
    assert batch.log_prob(rows).shape == (3, 16)
    free = columns.AutoregressiveColumns(logits, torch.zeros(4, 4)).log_prob(rows)
    assert torch.allclose(
        free, torch.distributions.Bernoulli(logits=logits).log_prob(rows).sum(1), atol=1e-12
    )


def test_fitted_columns_are_a_maximum(script):
    """Of rows drawn from it, the fit finds the law: no further from the truth than sampling puts it."""
    columns = script("autoregressive_columns")
    truth = columns.AutoregressiveColumns(torch.tensor([0.5, -0.3, 0.2]), 1.5 * torch.ones(3, 3))
    x, test = truth.sample((20_000,)), truth.sample((20_000,))
    fit = columns.fitted_columns(x, test)
    assert (fit.log_prob(x).mean() - truth.log_prob(x).mean()).item() > -1e-4  # six parameters gain 6 / 2N
    assert (truth.log_prob(test) - fit.log_prob(test)).mean().item() < 1e-3
    upper = torch.ones(3, 3).triu(1).bool()
    assert bool((fit.weight[~upper] == 0).all())
    assert torch.allclose(fit.weight[upper], torch.full((3,), 1.5), atol=0.2)


def test_pairs_of_seeds_go_along_diagonals(script):
    pairs = script("toys").diagonals(20, 20)
    assert len(set(pairs)) == len(pairs) == 400
    for seeds in zip(*pairs[:20], strict=True):
        assert sorted(seeds) == list(range(20))
    assert sorted(script("toys").diagonals(2, 3)) == list(itertools.product(range(2), range(3)))


def test_target_is_reached_at_the_first_point_within_it(script):
    shared = script("exact_or_amortised")
    points = [shared.Point(1.0, 0.5, 3.0), shared.Point(2.0, 1.0, 1.9), shared.Point(3.0, 1.5, 1.8)]
    assert shared.reached(points, 2.0) == points[1]
    assert shared.reached(points, 1.0) is None


def test_missing_data_are_named_with_where_they_were_sought(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_CPA_DATA", str(tmp_path))
    with pytest.raises(Exception, match=f"DNA was not found; sought: {tmp_path / 'dna.npz'}"):
        script("runs").binary_table("dna", None)
