"""Two runs against each other: what counts as the same figure, what is worse, and what the command says of it."""

import pytest
from typer.testing import CliRunner

from convrot_bench.cli import app
from convrot_bench.compare import changes_table, compare, compare_commits
from convrot_bench.results import Writer, load

FACTS = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "triton": "3", "commit": "old"}


def rows_of(path, factor=1.0, facts=None, slower=()):
    """Three figures, each `factor` times as large; those named slower by another 10 %."""
    writer = Writer(path, "ops", FACTS | (facts or {}))
    for n in (1024, 2048):
        for backend in ("cutlass", "triton"):
            more = 1.1 if (n, backend) in slower else 1.0
            writer.write("gemm", {"M": 8, "N": n}, 10.0 * factor * more, 20.0, "us", "bf16", backend=backend)
    writer.write("psnr", {"M": 8}, 30.0 / factor, 40.0, "db", "bf16", backend="cutlass")
    return load([path])


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_planted_regression_is_flagged_and_nothing_else(tmp_path):
    old = rows_of(tmp_path / "a.jsonl")
    new = rows_of(tmp_path / "b.jsonl", 1.02, slower=[(2048, "triton")])
    found = compare(old, new, 5.0, ("a", "b"))
    (flagged,) = found.regressions
    assert (flagged.case, flagged.shape, flagged.backend) == ("gemm", "M=8, N=2048", "triton")
    assert flagged.worse == pytest.approx(12.2)
    assert found.changes[0] is flagged
    assert len(found.changes) == 5
    table = changes_table(found)
    assert "5 figures in both, 1 worse by more than 5 %; 0 only in the old, 0 only in the new." in table
    assert "| `gemm` | M=8, N=2048 | triton | 10 us | 11.22 us | **12.2 % worse** |" in table
    assert "| `gemm` | M=8, N=1024 | cutlass | 10 us | 10.2 us | -2.0 % |" in table
    assert changes_table(found, only_flagged=True).count("| `") == 1


def test_larger_is_better_where_the_unit_says_so(tmp_path):
    old, new = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl", 2.0)
    worse = {c.case: c.worse for c in compare(old, new, 5.0, ("a", "b")).changes}
    assert worse == {"gemm": pytest.approx(100), "psnr": pytest.approx(50)}
    better = compare(new, old, 5.0, ("b", "a"))
    assert not better.regressions
    assert "| 50.0 % better |" in changes_table(better)


def test_medians_of_runs_are_compared(tmp_path):
    old = rows_of(tmp_path / "a.jsonl")
    for factor in (1.0, 1.01, 9.0):  # one run that something else disturbed
        new = rows_of(tmp_path / "b.jsonl", factor)
    found = compare(old, new, 5.0, ("a", "b"))
    assert not found.regressions
    assert max(c.worse for c in found.changes) == pytest.approx(1.0)


def test_other_gpus_and_shapes_are_not_the_same_figure(tmp_path):
    old, new = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl", facts={"gpu": "NVIDIA L4"})
    with pytest.raises(ValueError, match=r"a and b have no case, shape, backend and GPU in common \(NVIDIA H200 and"):
        compare(old, new, 5.0, ("a", "b"))
    found = compare(old[:3], old[1:], 5.0, ("a", "b"))
    assert (len(found.changes), found.only_old, found.only_new) == (2, 1, 2)


def test_the_command_fails_on_a_regression_only_when_told_to(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    rows_of(old)
    rows_of(new, slower=[(1024, "cutlass")])
    result = run("--compare", old, new)
    assert result.exit_code == 0, result.output
    assert "new.jsonl against old.jsonl: 5 figures in both, 1 worse by more than 5 %" in result.output
    assert "**10.0 % worse**" in result.output
    assert run("--compare", old, new, "--fail-on-regression").exit_code == 1
    assert run("--compare", old, new, "--fail-on-regression", "--threshold", 15).exit_code == 0
    assert run("--compare", new, old, "--fail-on-regression").exit_code == 0


def test_the_page_of_a_comparison_has_its_changes(tmp_path):
    old, new, page = tmp_path / "old.jsonl", tmp_path / "new.jsonl", tmp_path / "changes.html"
    rows_of(old)
    rows_of(new, slower=[(1024, "cutlass")])
    assert run("--compare", old, new, "--html", page).exit_code == 0
    html = page.read_text()
    assert '<section id="changes">' in html
    assert "10.0 % worse" in html
    assert 'href="new.jsonl"' in html


def test_a_commit_is_compared_with_the_newest_rows_of_others(tmp_path):
    path = tmp_path / "results" / "o.jsonl"
    rows_of(path, facts={"commit": "aaa111"})
    rows_of(path, 3.0, facts={"commit": "bbb222"})
    rows = [
        r | {"date": f"2026-01-0{1 + i // 5}"} for i, r in enumerate(rows_of(path, 1.1, facts={"commit": "ccc333"}))
    ]
    found = compare_commits(rows, "aaa", 5.0)
    assert {round(c.worse) for c in found.changes} == {9, 10}
    with pytest.raises(ValueError, match="no rows of commit 'ddd'; the results have aaa111, bbb222, ccc333"):
        compare_commits(rows, "ddd", 5.0)
    result = run("--baseline", "aaa111", "--results", path.parent)
    assert result.exit_code == 0, result.output
    assert "the newest rows against commit aaa111" in result.output


def test_two_things_to_compare_are_one_too_many(tmp_path):
    rows_of(tmp_path / "a.jsonl")
    result = run("--compare", tmp_path / "a.jsonl", tmp_path / "a.jsonl", "--baseline", "x", "--results", tmp_path)
    assert "give one of them" in str(result.exception)
