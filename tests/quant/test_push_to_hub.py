"""push_to_hub and save_pretrained(push_to_hub=True) upload our model card with the files; the hub is a fake."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convrot_quant import ConvRotConfig, load_quantized

REPO = "someone/FLUX.1-dev-4bit"
OWN_CARD = "---\nlicense: mit\n---\n\n# My own words\n"


class FakeHub:
    """What diffusers calls of the hub; `uploaded`: copies of the folders that came."""

    def __init__(self, root: Path) -> None:
        self.root, self.card, self.calls = root, "", []  # type: ignore[var-annotated]

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id: str, folder_path: Any, **options: Any) -> str:
        self.calls.append((repo_id, options))
        shutil.copytree(folder_path, self.root / f"{len(self.calls)}")
        return f"https://hub/{repo_id}"

    def load_card(self, repo_id: str, **options: Any) -> Any:
        """As ModelCard.load, and as diffusers' own answer where there is none."""
        from huggingface_hub import ModelCard
        from huggingface_hub.errors import EntryNotFoundError

        if not self.card:
            raise EntryNotFoundError("no README.md")
        return ModelCard(self.card)

    @property
    def last(self) -> Path:
        return self.root / f"{len(self.calls)}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import diffusers.models.modeling_utils as models
    import diffusers.utils.hub_utils as utils

    fake = FakeHub(tmp_path / "hub")
    for module in (models, utils):
        monkeypatch.setattr(module, "create_repo", fake.create_repo)
    monkeypatch.setattr(utils, "upload_folder", fake.upload_folder)
    monkeypatch.setattr(utils.ModelCard, "load", fake.load_card)
    return fake


@pytest.fixture(scope="module")
def model(make_flux: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("flux")
    make_flux(1, 1).save_pretrained(folder)  # type: ignore[operator]
    config = ConvRotConfig(quantization_device="cpu")
    found: Any = FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    found.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    return found


def check(card: str, load: str) -> None:
    assert "base_model: black-forest-labs/FLUX.1-dev\n" in card
    assert "base_model_relation: quantized\n" in card
    assert f"FluxTransformer2DModel.from_pretrained({load}, dtype=torch.bfloat16)" in card
    assert "| transformer_blocks.0.attn.to_q | 1 | 512 x 512 |" in card


def test_push_to_hub_uploads_the_card_and_a_model_that_loads(hub: FakeHub, model: Any) -> None:
    assert model.push_to_hub(REPO) == f"https://hub/{REPO}"
    check((hub.last / "README.md").read_text(), f'"{REPO}"')
    loaded = load_quantized(hub.last)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_subfolder_is_named_in_the_card(hub: FakeHub, model: Any) -> None:
    model.push_to_hub(REPO, subfolder="transformer")
    check((hub.last / "README.md").read_text(), f'"{REPO}", subfolder="transformer"')
    assert hub.calls[-1][1]["path_in_repo"] == "transformer"


def test_save_pretrained_uploads_the_same_card(hub: FakeHub, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id=REPO)
    check((hub.last / "README.md").read_text(), f'"{REPO}"')


def test_our_card_of_an_earlier_push_is_renewed_and_another_hands_card_is_kept(hub: FakeHub, model: Any) -> None:
    model.push_to_hub(REPO)
    hub.card = (hub.last / "README.md").read_text().replace("512 x 512", "1 x 1")
    model.push_to_hub(REPO)
    check((hub.last / "README.md").read_text(), f'"{REPO}"')
    hub.card = OWN_CARD
    model.push_to_hub(REPO)
    card = (hub.last / "README.md").read_text()
    assert "# My own words" in card
    assert "Hadamard" not in card
