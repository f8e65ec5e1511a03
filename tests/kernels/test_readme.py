import re
from pathlib import Path

from convrot_kernels import ops

README = Path(__file__).parents[2] / "packages" / "convrot-kernels" / "README.md"


def test_the_example_runs_and_has_the_error_it_states() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example.replace("print(", "error = ("), str(README), "exec"), names)
    assert 0.15 < float(names["error"]) < 0.25  # type: ignore[arg-type]


def test_every_op_is_in_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [op for op in (schema.partition("(")[0] for schema in ops.SCHEMAS) if f"`{op}`" not in text]
    assert not missing
