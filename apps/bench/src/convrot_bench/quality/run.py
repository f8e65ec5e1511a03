"""One run: the 16-bit model, then every method; rows as soon as the baseline is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from convrot_bench.bench import ERRORS, GateError
from convrot_bench.quality.methods import BASELINE, METHODS, Method
from convrot_bench.quality.suite import Measured, Suite
from convrot_bench.results import Writer

# case suffix -> unit; what a row of the tables is made of
CASES = {
    "layer_l2_median": "relative_l2", "layer_l2_p95": "relative_l2", "layer_l2_worst": "relative_l2", "psnr_db": "db",
    "ssim": "ssim", "lpips": "lpips", "fid": "fid", "clip_score": "score", "image_reward": "score",
    "caption_accuracy": "share", "object": "share", "color": "share", "relation": "share", "bytes": "bytes",
}  # fmt: skip


@dataclass
class Rows:
    """Writes what was measured, each figure beside the baseline's of this run; in one process of the run alone."""

    writer: Writer | None
    shape: dict[str, Any]
    more: dict[str, Any]
    base: dict[int, Measured] = field(default_factory=dict)

    def write(self, name: str, found: dict[int, Measured]) -> None:
        """The rows of one method."""
        if self.writer is None:
            return
        for steps, measured in found.items():
            shape = {"model": self.shape["model"], "steps": steps} | self.shape
            for case, value in measured.figures.items():
                more = self.more | measured.more
                if case == "layer_l2_median":
                    more["layer_l2"] = measured.layer_l2
                base = self.base[steps].figures.get(case)
                if base is None:
                    more["error"] = f"{BASELINE} has no {case}"
                self.writer.write(f"{name}/{case}", shape, value, base, CASES[case], BASELINE, **more)


def run(
    suite: Suite, writer: Writer | None, methods: Sequence[Method], more: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Measure and write rows (`writer` None: in the other processes of a run). `more`: fields of every row.

    A method that does not run is said and left out; the run goes on and fails at its end, naming them.
    """
    reference = suite.reference(calibrate=any(m.needs_inputs for m in methods))
    for name, found in reference.items():
        tell(name, found, say)
    rows, failures = Rows(writer, suite.subject.shape, more), []
    for method in sorted(methods, key=lambda m: m.name != BASELINE):
        found, why = attempt(suite, method)
        if why:
            failures.append(f"{method.name}: {why}")
            say(f"not measured: {failures[-1]}")
            if method.name == BASELINE:
                raise GateError(f"quality: the baseline {failures[-1]}")
            continue
        if method.name == BASELINE:
            rows.base = found
            for known, measured in reference.items():
                rows.write(known, measured)
        rows.write(method.name, found)
        tell(method.name, found, say)
    if failures:
        raise GateError(f"quality: {len(failures)} not measured: " + "; ".join(failures))


def attempt(suite: Suite, method: Method) -> tuple[dict[int, Measured], str]:
    """(figures, "") or ({}, why it does not run here)."""
    try:
        return suite.measure(method), ""
    except ERRORS as error:
        return {}, str(error)


def tell(name: str, found: dict[int, Measured], say: Callable[[str], None]) -> None:
    """One line a step count."""
    for steps, measured in found.items():
        say(f"{name}, {steps} steps: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.figures.items()))


def select(names: Sequence[str], known: Sequence[Method] = METHODS) -> list[Method]:
    """Methods by name, the baseline always among them; an unknown name is refused."""
    by_name = {m.name: m for m in known}
    if unknown := [n for n in names if n not in by_name]:
        raise ValueError(f"quality: unknown method {unknown[0]!r}; use some of {', '.join(by_name)}")
    return [m for m in known if not names or m.name in names or m.name == BASELINE]
