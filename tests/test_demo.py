# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The demonstration runs on digits and on user tables, and says in one line what is wrong with a bad one."""

from __future__ import annotations

import math
import subprocess
import sys

import pyro
import pytest
import torch

from pyro_cpa.demo import main
from pyro_cpa.demo.data import digits, table
from pyro_cpa.demo.report import Row, format_table
from pyro_cpa.demo.table_file import read_table
from pyro_cpa.errors import InvalidData

PICTURES = {"evidence.png", "partition.png", "posteriors.png", "generated.png"}
FITS = ["EM", "exact ML", "VAE", "VAE + EM"]


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "table.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def user_table(rows=60, missing=True):
    """Three columns on a curve, one constant, some cells missing in each of the three ways."""
    t = torch.randn(rows)
    lines = ["height,weight,dose,site"]
    for i, (a, b, c) in enumerate(torch.stack([t, t.abs(), t**2], 1).tolist()):
        cells = [f"{a:.4f}", f"{100 * b:.4f}", f"{c:.4f}", "7"]
        if missing and i % 7 == 0:
            cells[i // 7 % 3] = ("", "NA", "nan")[i // 7 % 3]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def table_of(output):
    """Numbers of the printed table: fit -> (train, test, elbo, gap, seconds, regions)."""
    found = {}
    for line in output.splitlines():
        name = line[:10].strip()
        if name in FITS:
            found[name] = [float(cell) for cell in line[10:].split()]
    return found


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            "a,b\n1,2\n3,4\n",
            "1,2\n3,4\n",
            "a;b\n1;2\n3;4",
            "a\tb\r\n1\t2\r\n\r\n3\t4\r\n",
            '"a","b"\n"1"," 2"\n3,4\n',
        ],
    )
    def test_separators_headers_quotes_and_blank_lines(self, write, text):
        values, names = read_table(write(text))
        assert values.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert names == (["a", "b"] if "a" in text else ["column 1", "column 2"])

    def test_missing_cells_and_byte_order_mark(self, write):
        values, names = read_table(write("x,y\n,NA\nnan,1e-3\nN/A, 2 \n", "utf-8-sig"))
        assert names == ["x", "y"]
        assert [[None if math.isnan(v) else v for v in row] for row in values.tolist()] == [
            [None, None],
            [None, 1e-3],
            [None, 2.0],
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,b\n1,2\n3,four\n", r"row 3, column 'b': 'four' is not a finite number"),
            ("1,2\n\n3,inf\n", r"row 3, column 'column 2': 'inf' is not a finite number"),
            ("a,b\n1,2,3\n", r"row 2 has 3 cells: expected 2"),
            ("a,b\n", r"header but no rows"),
            ("\n\n", r"is empty"),
        ],
    )
    def test_faults_are_named_by_row_and_column(self, write, text, message):
        with pytest.raises(InvalidData, match=message):
            read_table(write(text))

    def test_what_is_no_text_file(self, tmp_path):
        with pytest.raises(InvalidData, match="No such file"):
            read_table(tmp_path / "absent.csv")
        with pytest.raises(InvalidData, match="cannot be read as a table"):
            read_table(tmp_path)
        (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
        with pytest.raises(InvalidData, match="cannot be read as a table"):
            read_table(tmp_path / "picture.csv")


class TestData:
    def test_digits_are_split_and_scaled(self):
        data = digits(seed=0)
        assert data.train.shape == (1500, 64) and data.test.shape == (297, 64)
        assert data.train.dtype == torch.float64
        whole = torch.cat([data.train, data.test])
        assert whole.min() >= 0 and whole.max() <= 1
        levels = (17 * whole).floor()
        assert len(levels.unique(dim=0)) == 1797 and levels.unique().tolist() == list(range(17))
        # Within its level a value is uniform: mean 1/2, variance 1/12.
        error = (1 / 12 / whole.numel()) ** 0.5
        assert abs((17 * whole - levels).mean() - 0.5) < 5 * error
        assert not torch.equal(data.train, digits(seed=1).train)

    def test_columns_are_standardised_by_the_training_rows(self, write):
        path = write(user_table())
        data = table(path, seed=0)
        assert data.names == ["height", "weight", "dose"]
        assert any("left out" in line and "site" in line for line in data.about)
        assert torch.allclose(data.train.nanmean(0), torch.zeros(3), atol=1e-12)
        assert torch.allclose(data.train.square().nanmean(0), torch.ones(3), atol=1e-12)
        # One affine map a column takes the file to train and test rows together.
        file = read_table(path)[0][:, :3]
        both = torch.cat([data.train, data.test])
        for raw, scaled in zip(file.mT, both.mT, strict=True):
            raw, scaled = (v[~v.isnan()].sort().values for v in (raw, scaled))
            slope = (scaled[-1] - scaled[0]) / (raw[-1] - raw[0])
            assert torch.allclose(scaled, scaled[0] + slope * (raw - raw[0]), atol=1e-10)

    def test_too_little_is_refused(self, write):
        with pytest.raises(InvalidData, match="5 rows with data: expected at least 20"):
            table(write(user_table(5)), seed=0)
        with pytest.raises(InvalidData, match="1 column"):
            table(write("a,b\n" + "\n".join(f"{i},3" for i in range(30))), seed=0)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_short_mode_on_digits(tmp_path, capsys, latent_dim):
    kept = dict(pyro.get_param_store())
    assert main(["--short", "--latent-dim", str(latent_dim), "--out", str(tmp_path / "new" / "out")]) == 0
    output = capsys.readouterr().out
    found = table_of(output)
    assert list(found) == FITS
    for name in ("EM", "exact ML", "VAE + EM"):
        train, test, elbo, gap, *_ = found[name]
        assert gap == 0.0 and test == elbo
    train, test, elbo, gap, seconds, regions = found["VAE"]
    assert gap == pytest.approx(test - elbo, abs=2e-3) and gap > 0
    assert regions > 1
    assert found["VAE + EM"][0] >= train
    assert {p.name for p in (tmp_path / "new" / "out").iterdir()} == PICTURES
    assert all(len(line) <= 100 for line in output.splitlines())
    assert dict(pyro.get_param_store()) == kept


def test_a_users_table_with_missing_cells(write, tmp_path, capsys):
    path = write(user_table())
    assert main(["--short", "--latent-dim", "1", "--data", str(path), "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert list(table_of(output)) == FITS
    assert "left out" in output and "cells are missing" in output and "12 to test on" in output
    assert PICTURES <= {p.name for p in tmp_path.iterdir()}


def test_a_seed_repeats_the_run(write, tmp_path, capsys):
    path, found = write(user_table(missing=False)), []
    for seed in ("3", "3", "4"):
        main(["--short", "--latent-dim", "1", "--data", str(path), "--seed", seed, "--out", str(tmp_path)])
        rows = table_of(capsys.readouterr().out)
        found.append([values[:4] for values in rows.values()])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("a,b,c\n1,2,3\n4,x,6\n", [], "row 3, column 'b': 'x' is not a finite number"),
        ("a,b\n" + "\n".join(f"{i},{i % 5}" for i in range(30)), ["--latent-dim", "2"], "Use --latent-dim 1"),
    ],
)
def test_a_bad_table_gets_one_line_and_exit_code_2(write, capsys, text, arguments, message):
    assert main(["--data", str(write(text)), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_as_a_command():
    command = [sys.executable, "-m", "pyro_cpa.demo", "--data", "absent.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: absent.csv cannot be read as a table: No such file or directory"


def test_the_table_is_aligned_and_an_exact_gap_is_never_minus_zero():
    text = format_table(
        [Row("EM", -1.0, -123.4567, -123.4567 + 1e-13, 12.34, 9), Row("VAE", 1, 2, 1.5, 100, 12345)]
    )
    lines = text.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[-2].split() == ["EM", "-1.000", "-123.457", "-123.457", "0.000", "12.3", "9"]
    assert lines[-1].split() == ["VAE", "1.000", "2.000", "1.500", "0.500", "100.0", "12345"]
