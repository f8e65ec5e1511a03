import importlib
import sys
import threading
import warnings
from types import ModuleType

import pytest
import torch

from convrot_kernels import BackendError, available_backends, dispatch, reference, rotate, use_backend


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend for `rotate` alone, first in its row: it answers 7. Set `reason` to make it refuse."""
    module = ModuleType("toy_backend")
    module.reason = None  # type: ignore[attr-defined]
    module.why_not = lambda device: module.reason  # type: ignore[attr-defined]
    module.rotate = lambda x, group_size=256: torch.full_like(x, 7)  # type: ignore[attr-defined]
    monkeypatch.setitem(dispatch.BACKENDS, "toy", "toy_backend")
    monkeypatch.setitem(dispatch.ORDER, "rotate", ("toy", "reference"))
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    return module


def _answer() -> float:
    return float(rotate(torch.ones(256))[0])


def test_auto_takes_the_first_that_can_run(toy: ModuleType) -> None:
    assert _answer() == 7
    toy.reason = "no such GPU"  # type: ignore[attr-defined]
    assert _answer() == 1
    reasons = available_backends("cpu")
    assert (reasons["toy"], reasons["reference"]) == ("no such GPU", None)


def test_a_named_backend_is_used_inside_the_block_only(toy: ModuleType) -> None:
    with use_backend("reference"):
        assert _answer() == 1
        with use_backend("toy"):
            assert _answer() == 7
        with use_backend("auto"):
            assert _answer() == 7
        assert _answer() == 1
    assert _answer() == 7


def test_the_choice_ends_with_an_exception(toy: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert _answer() == 7


def test_a_named_backend_never_falls_back(toy: ModuleType) -> None:
    toy.reason = "no such GPU"  # type: ignore[attr-defined]
    message = r'rotate: the chosen backend cannot run on cpu: toy: no such GPU; use_backend\("auto"\) picks another'
    with use_backend("toy"), pytest.raises(BackendError, match=message):
        _answer()


def test_a_named_backend_without_the_op_never_falls_back(toy: ModuleType) -> None:
    message = "pack_int4: the chosen backend cannot run on cpu: toy: does not implement pack_int4;"
    with use_backend("toy"), pytest.raises(BackendError, match=message):
        dispatch.select("pack_int4", "cpu")


def test_auto_lists_the_reason_of_every_backend(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.reason = "no compiled library, run `nox -s kernels`"  # type: ignore[attr-defined]
    monkeypatch.setattr(reference, "why_not", lambda device: "not today")
    message = (
        r"^rotate: no backend can run on cpu: toy: no compiled library, run `nox -s kernels`; reference: not today$"
    )
    with pytest.raises(BackendError, match=message):
        _answer()


def test_auto_takes_the_fastest_first_and_the_reference_last() -> None:
    assert all(names[-1] == "reference" for names in dispatch.ORDER.values())
    assert {names[0] for op, names in dispatch.ORDER.items() if op.startswith(("scaled", "rotate_"))} == {"cutlass"}


def test_a_gpu_that_a_faster_backend_could_serve_is_named_once_with_the_remedy(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch._warn_once.cache_clear()
    message = "the reference backend serves this GPU, there are faster kernels: toy: not built; run `make toy`"
    toy.reason = "not built; run `make toy`"  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=f"^{message}$"):
        dispatch.pick("rotate", "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.pick("rotate", "cuda:1")
        dispatch._warn_once.cache_clear()
        dispatch.pick("rotate", "cpu")
        with use_backend("reference"):
            dispatch.pick("rotate", "cuda")
        toy.reason = "needs another GPU"  # type: ignore[attr-defined]
        dispatch.pick("rotate", "cuda")


def test_an_unknown_backend_is_refused_by_name() -> None:
    message = rf"^use_backend: unknown backend 'cutlas'; use one of auto, {', '.join(dispatch.BACKENDS)}$"
    with pytest.raises(BackendError, match=message), use_backend("cutlas"):
        pass


def test_the_choice_belongs_to_its_thread(toy: ModuleType) -> None:
    answers: dict[str, float] = {}
    inside, done = threading.Event(), threading.Event()

    def chooses() -> None:
        with use_backend("reference"):
            inside.set()
            done.wait(10)
            answers["chooses"] = _answer()

    thread = threading.Thread(target=chooses)
    thread.start()
    assert inside.wait(10)
    answers["main"] = _answer()
    done.set()
    thread.join(10)
    assert answers == {"main": 7, "chooses": 1}


def test_the_choice_holds_inside_compiled_code(toy: ModuleType) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rotate(x), fullgraph=True, backend="aot_eager")
    with use_backend("reference"):
        assert compiled(torch.ones(256))[0] == 1
    assert compiled(torch.ones(256))[0] == 7


def test_reference_says_why_mps_cannot_run() -> None:
    assert available_backends("mps")["reference"] == "mps has no float64, move the tensors to the cpu"


def test_every_backend_has_what_dispatch_asks_for() -> None:
    for op, names in dispatch.ORDER.items():
        for name in names:
            module = importlib.import_module(dispatch.BACKENDS[name])
            for function in (op, "why_not", "preferred_codes", "preferred_layout"):
                assert callable(getattr(module, function)), f"{name} lacks {function}"
