"""The HTML report: everything inside, made of rows alone, the same every time."""

import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from convrot_bench import html as page
from convrot_bench.charts import COLORS, bars, dots, stacks
from convrot_bench.cli import app
from convrot_bench.html import Source, render
from convrot_bench.markdown import to_html
from convrot_bench.model.flux import shape_of
from convrot_bench.model.kernels import TITLES
from convrot_bench.results import Writer
from convrot_bench.sections import SECTIONS, rotations, sources

FACTS = {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11", "triton": "3.6", "commit": "abc123"}
MODEL = {"backend": "cutlass", "multiplied": "int4 codes", "how": "compiled", "baseline_how": "compiled", "fused": True}


def write_rows(folder):
    """A row or two for every chapter."""
    ops, model = Writer(folder / "ops.jsonl", "ops", FACTS), Writer(folder / "model.jsonl", "model", FACTS)

    def op(case, shape, ours, baseline, name="torch.matmul bf16", **more):
        ops.write(case, shape, ours, baseline, "us", name, **({"backend": "cutlass"} | more))

    for n, k in ((3072, 3072), (9216, 3072)):
        shape = {"M": 4608, "N": n, "K": k}
        for case in ("gemm_w4a4", "linear_w4a4"):
            op(case, shape, 70.25, 140.5, tops=1234.0)
            op(case, shape, 90.0, 140.5, backend="triton", tops=900.0)
        steps = dict.fromkeys(("rotate", "scale", "quantize", "pack", "gemm", "epilogue"), 10.0)
        steps |= {"fused_rotate_quantize": 8.0, "fused_scaled_mm": 20.0, "bf16": 60.0}
        op("breakdown", shape, 28.5, 50.0, "unfused steps", **steps)
        op("peers/int_mm", shape, 20.0, 31.0, "torch._int_mm", peer_version="2.11")
    op("rotate_quantize", {"M": 4608, "K": 3072, "prologue": "none"}, 12.0, 11.0, "copy of the same bytes", gb_s=3e3)
    op("ceiling/copy", {"bytes": 1}, 1.0, 1.0, "torch copy_", gb_s=4001.0)
    op("ceiling/int8", {"M": 1}, 1.0, 2.0, tops=1501.0, baseline_tops=702.0)
    survey = {"of_ceiling": 0.8765, "ceiling": "int8", "tops": 1300.0}
    op("survey/scaled_mm", {"model": "FLUX.1-dev", "M": 4608, "N": 3072, "K": 3072}, 67.0, 130.0, **survey)
    more = {"fused": 12.0, "gb_s": 3000.0, "backend": "triton"}
    op("rotations/dense", {"M": 4608, "K": 3072}, 19.0, 26.0, "dense product", baseline_gb_s=2000.0, **more)
    eight = {"tflops": 850.0, "baseline_tflops": 600.0, "relative_l2": 0.08, "baseline_relative_l2": 0.003}
    op("attention_fp8", {"tokens": 4608, "heads": 24, "D": 128}, 300.0, 420.0, "cuDNN attention bf16", **eight)
    op("rotations/x", {"M": 4608, "K": 3072}, 19.0, None, "<b>x</b>", error="ImportError: no <x>", **more)
    shape = shape_of(1024)
    for case in ("flux_step_compiled", "flux_step_best"):
        model.write(case, shape, 61.75, 123.5, "ms", "BF16 compiled", **MODEL)
    model.write("flux_weights", {"model": "FLUX.1-dev"}, 6.06e9, 23.8e9, "bytes", "BF16", **MODEL)
    kinds = dict.fromkeys(TITLES, 5.0)
    model.write("breakdown/ours_compiled", shape, 78.0, 78.0, "ms", "wall", kernels=100, **kinds, **MODEL)
    quality = Writer(folder / "quality.jsonl", "quality", FACTS)
    for name in ("bf16", "ours_w4a4"):
        for case, value in (("caption_accuracy", 0.985), ("object", 0.99)):
            sizes = {"model": "weights", "steps": 20, "prompts": 500}
            quality.write(f"{name}/{case}", sizes, value, 1.0, "share", "paper_w4a4", device="cuda")
    return folder


def make(folder, *options):
    images = folder / "images"
    command = ["report", "--results", str(folder), "--images", str(images), "--html", str(folder / "page.html")]
    page_md = folder / "page.md"
    page_md.touch()
    return CliRunner().invoke(app, [*command, *options, str(page_md)])


class Loads(HTMLParser):
    """What a browser would fetch, and what it could go to."""

    def __init__(self):
        super().__init__()
        self.fetched, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.fetched.append(value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_rows(tmp_path_factory.mktemp("results"))
    result = make(folder)
    assert result.exit_code == 0, result.output
    return folder, (folder / "page.html").read_text()


def test_the_page_fetches_nothing(made):
    folder, text = made
    loads = Loads()
    loads.feed(text)
    assert all(value.startswith(("#", "data:")) for value in loads.fetched), loads.fetched
    assert not {"script", "link", "iframe", "object", "embed"} & set(loads.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "http" not in text
    files = [link for link in loads.links if not link.startswith("#")]
    assert set(files) == {"model.jsonl", "ops.jsonl", "quality.jsonl"}
    assert all((folder / link).exists() for link in files)


def test_every_line_of_the_contents_leads_to_a_chapter(made):
    _, text = made
    loads = Loads()
    loads.feed(text)
    targets = [link[1:] for link in loads.links if link.startswith("#")]
    assert targets == [
        "summary", "models", "kernels", "survey", "steps", "rotations", "peers", "attention", "quality", "sources",
    ]  # fmt: skip
    assert all(f'<section id="{target}">' in text for target in targets)


def test_its_numbers_are_those_of_the_rows(made):
    _, text = made
    for figure in (
        "2.00x", "61.8 ms against 123.5 ms",  # the card of the step
        "3.92x", "6.06 GB against 23.80 GB",
        "98.5 %", "1,501 TOPS", "4,001 GB/s", "88 % of int8", "NVIDIA H200", "580.1", "abc123",
    ):  # fmt: skip
        assert figure in text, figure
    assert re.search(r'<td class="number">70.2</td>', text)
    assert "does not run: ImportError: no &lt;x&gt;" in text
    assert "<b>x</b>" not in text


def test_the_same_rows_give_the_same_page(made, tmp_path):
    folder, text = made
    assert make(folder, "--check").exit_code == 0
    source = page.gather(folder / "page.html", sorted(folder.glob("*.jsonl")), images=folder / "images")
    assert render(source, SECTIONS) == text
    dates = set(re.findall(r"20\d\d-\d\d-\d\d", text))
    assert dates == {r["date"][:10] for r in source.rows}


def test_check_notices_a_stale_page_and_a_stale_chart(tmp_path):
    """A drawing of another version of matplotlib is not stale: what it shows counts."""
    folder, target = write_rows(tmp_path), tmp_path / "page.html"

    def changed(*, check):
        source = page.gather(target, sorted(folder.glob("*.jsonl")), images=None)
        return page.update(target, source, (rotations, sources), check=check)

    assert changed(check=True) == [target]
    assert not target.exists()
    assert changed(check=False) == [target]
    assert changed(check=True) == []
    fresh = target.read_text()
    target.write_text(re.sub(r"<svg.*?</svg>", "<svg>drawn by another version</svg>", fresh, flags=re.DOTALL))
    assert changed(check=True) == []
    target.write_text(re.sub(r'data-figures="\w+"', 'data-figures="0"', fresh, count=1))
    assert changed(check=True) == [target]
    target.write_text(fresh)
    Writer(folder / "ops.jsonl", "ops", FACTS).write("x", {"M": 1}, 1.0, 1.0, "us", "y", backend="cutlass")
    assert changed(check=True) == [target]


def test_named_pages_make_no_html(tmp_path):
    folder = write_rows(tmp_path / "results")
    (tmp_path / "page.md").touch()
    command = ["report", str(tmp_path / "page.md"), "--results", str(folder), "--images", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert not list(tmp_path.glob("**/*.html"))


def test_the_page_alone_leaves_everything_else(tmp_path, monkeypatch):
    folder = write_rows(tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("<!-- results:ops -->\n<!-- /results -->\n")
    before = (tmp_path / "README.md").read_text()
    result = CliRunner().invoke(app, ["report", "--results", str(folder), "--html", "outputs/page.html"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "README.md").read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "outputs", "results"}
    assert 'href="../results/ops.jsonl"' in (tmp_path / "outputs" / "page.html").read_text()


def test_a_page_without_rows_has_only_its_sources():
    text = render(Source([]), SECTIONS)
    assert re.findall(r'<section id="(\w+)">', text) == ["sources"]


def test_markdown_tables_scroll_and_align():
    html = to_html("| what | us |\n| --- | --- |\n| `a`, b | 1,234.5 |\n| c ✓ | **missed** |\n")
    assert html.startswith('<div class="scroll"><table class="few">')
    assert '<th class="number">us</th>' in html or '<td class="number">1,234.5</td>' in html
    assert '<strong class="missed">missed</strong>' in html
    assert '<span class="met">✓</span>' in html
    assert "<script>" not in to_html("<script>alert(1)</script>")
    assert to_html("") == ""


def test_charts_take_the_colours_of_the_page():
    values = {"a & b": {"x": 1.5, "y": 2.0}, "c": {"x": 0.5}}
    first = bars("one <1>", values, "times", at=1, base="y")
    drawn = (first, stacks("two", values, "ms"), dots("three", values, "%", most=3))
    for chart in drawn:
        assert chart.svg.startswith("<svg viewBox=")
        assert "var(--ours)" in chart.svg
        assert "var(--ink)" in chart.svg
        assert not any(stand_in in chart.svg for stand_in in COLORS)
        assert "a &amp; b" in chart.svg
        assert "<style" not in chart.svg
        assert "font-family" not in chart.svg
    assert "var(--base)" in drawn[0].svg
    assert len({chart.digest for chart in drawn}) == 3
    assert bars("one <1>", values, "times", at=1, base="y") == drawn[0]
    assert bars("one <1>", {"a & b": {"x": 1.6}}, "times", at=1).digest != drawn[0].digest
