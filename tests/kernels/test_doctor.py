import json
import subprocess
import sys

import pytest
import torch

from convrot_kernels import __main__ as doctor
from convrot_kernels import dispatch, reference
from convrot_kernels.backends.cutlass import binding


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convrot_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_reports_json_and_succeeds() -> None:
    result = _run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["packages"]["torch"] == torch.__version__
    assert "convrot-kernels" in report["packages"]
    assert report["devices"]["cpu"]["backends"]["reference"] is None
    assert report["devices"]["cpu"]["auto"] == dict.fromkeys(dispatch.ORDER, "reference")
    assert report["binding"] == binding.why_not()
    assert len(report["devices"]) == 1 + len(report["gpus"])


def test_text_names_versions_backends_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "reference: ready" in text
    assert f"binding, GPU ops without Python: {binding.why_not() or 'ready'}" in text
    assert all(f"{op:<26}reference" in text for op in dispatch.ORDER)


def test_without_a_backend_it_fails_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "why_not", lambda device: "not today")
    assert doctor.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "rotate: no backend can run on cpu: " in text
    assert "reference: not today" in text


def test_help_and_a_wrong_command() -> None:
    shown = _run("--help")
    assert shown.returncode == 0
    assert "why it cannot run" in shown.stdout
    wrong = _run("docter")
    assert wrong.returncode == 2
    assert "invalid choice: 'docter'" in wrong.stderr
