"""README's tree names what there is: every package, module and nox session, and nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sections() -> dict[str, str]:
    """{what an unindented line of the tree names: its description and the lines below it}."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Tree\n\n```\n")[2].partition("```")[0]
    parts = re.split(r"^(?=\S)", tree, flags=re.MULTILINE)
    return {name: rest for name, _, rest in (part.partition(" ") for part in parts if part)}


def modules(folder: Path) -> Iterator[str]:
    """Modules right inside, and packages with modules of their own."""
    for path in folder.glob("*.py"):
        if path.name != "__init__.py":
            yield path.name
    for path in folder.rglob("__init__.py"):
        if path.parent != folder and len(list(path.parent.glob("*.py"))) > 1:
            yield f"{path.parent.relative_to(folder)}/"


@pytest.mark.parametrize("package", ["convrot-kernels", "convrot-quant"])
def test_every_module_of_the_packages_is_named_once(package: str) -> None:
    text = sections()[f"packages/{package}/"].partition("/\n")[2]
    named = re.findall(r"(?<!\S)(?:[\w/]+/|\w+\.py)(?!\S)", text)
    source = ROOT / "packages" / package / "src" / package.replace("-", "_")
    assert sorted(named) == sorted(modules(source))


def test_every_package_and_app_has_its_place_and_every_place_exists() -> None:
    named = sections()
    projects = [path.parent.relative_to(ROOT) for path in sorted(ROOT.glob("*/*/pyproject.toml"))]
    assert len(projects) >= 5
    assert {f"{path.as_posix()}/" for path in projects} <= named.keys()
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_sessions_are_those_of_nox() -> None:
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert sorted(sections()["noxfile.py"].split()[::2]) == sorted(sessions)
