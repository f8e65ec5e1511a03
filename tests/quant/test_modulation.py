"""Modulation of all fused blocks: one product a step, the same values, and each block's own where that cannot be."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels import scaled_mm_cat
from convrot_kernels.testing import assert_equal
from convrot_quant import QuantConfig, fuse_, quantize_
from convrot_quant.families import modulation
from convrot_quant.families.modulation import Modulations
from convrot_quant.linear import Side

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


@pytest.fixture(scope="module")
def quantized(make_flux: Flux) -> nn.Module:
    """Two double and two single blocks whose modulation matters."""
    model = make_flux(2, 2)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear" in name:
            nn.init.normal_(parameter, std=0.05)
    quantize_(model, progress=False, fuse=False)
    return model


@pytest.fixture
def flux(quantized: nn.Module) -> nn.Module:
    """The same, fused."""
    model = copy.deepcopy(quantized)
    fuse_(model)
    return model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each joint product had."""
    seen: list[int] = []

    def counted(a: Tensor, b: list[Tensor], *args: Any, **options: Any) -> Tensor:
        seen.append(len(b))
        return scaled_mm_cat(a, b, *args, **options)

    monkeypatch.setattr(modulation, "scaled_mm_cat", counted)
    return seen


def _alone(model: nn.Module, run: Run, **options: Any) -> Tensor:
    """What the model computes if every block makes its own vectors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Modulations, "of", lambda self, block, embedding: None)
        return run(model, **options)


def test_a_step_is_one_product_and_computes_what_the_blocks_do_alone(
    flux: nn.Module, run: Run, products: list[int]
) -> None:
    expected = [_alone(flux, run, seed=seed) for seed in (0, 1)]
    assert_equal(run(flux), expected[0])
    assert products == []  # the blocks become known
    assert_equal(run(flux), expected[0])
    assert_equal(run(flux, seed=1), expected[1])
    assert products == [3, 3]  # all but the first block; both layers of a double block are one weight


def test_compiled_blocks_are_handed_theirs(flux: nn.Module, run: Run, products: list[int]) -> None:
    expected = _alone(flux, run)
    flux.compile_repeated_blocks(fullgraph=True, backend="eager")
    run(flux)
    products.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal(run(flux), expected)
        run(flux, seed=1)
    assert products == [3, 3]


def test_compiled_single_blocks_find_text_and_image_in_a_row(
    flux: nn.Module, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convrot_quant.families import flux as fused

    copies: list[bool] = []

    def seen(text: Tensor, image: Tensor) -> Tensor:
        row = in_a_row(text, image)
        copies.append(row.data_ptr() != text.data_ptr())
        return row

    in_a_row = fused._in_a_row
    monkeypatch.setattr(fused, "_in_a_row", seen)
    flux.compile_repeated_blocks(fullgraph=True)
    run(flux)
    assert copies == [True, False]  # the double blocks' streams are apart


def test_a_model_compiled_as_a_whole_makes_them_in_its_graph(flux: nn.Module, run: Run, products: list[int]) -> None:
    expected = _alone(flux, run)
    assert_equal(run(torch.compile(flux, fullgraph=True, backend="eager")), expected)
    assert products == []


def test_layers_with_a_side_are_multiplied_by_their_block(flux: nn.Module, run: Run, products: list[int]) -> None:
    run(flux)
    linear = flux.get_submodule(f"{DOUBLE}.norm1_context.linear")
    before = run(flux)
    torch.manual_seed(0)
    linear.add_side("a", Side(torch.randn(4, linear.in_features), torch.randn(linear.out_features, 4), 0.1))
    products.clear()
    actual = run(flux)
    assert products == [3]  # the first block has made nothing: what it multiplies is its own affair
    assert_equal(actual, _alone(flux, run))
    assert not torch.equal(actual, before)
    linear.remove_side("a")
    assert_equal(run(flux), before)


def test_layers_of_two_schemes_are_two_products_whatever_their_order(
    make_flux: Flux, run: Run, products: list[int]
) -> None:
    model = make_flux(2, 1)
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    wide = {"transformer_blocks.0.norm1.linear": "W8A16", "transformer_blocks.1.norm1_context.linear": "W8A16"}
    quantize_(model, QuantConfig(overrides=wide), progress=False)
    expected = _alone(model, run)
    run(model)
    products.clear()
    assert_equal(run(model), expected)
    assert sorted(products) == [1, 2]


def test_values_are_made_anew_when_the_embedding_or_a_weight_changes(flux: nn.Module, products: list[int]) -> None:
    double, single = flux.get_submodule(DOUBLE), flux.get_submodule(SINGLE)
    embedding = torch.randn(1, double.norm1.linear.in_features)
    with torch.no_grad():
        for block in (double, single):
            block.vectors(embedding, None)
        embedding.add_(1)
        for block in (double, single):
            assert_equal(block.vectors(embedding, None)[0], block.modulated_by().alone(embedding)[0])
        assert products == [1]
        single.norm.linear.bias.add_(1)
        assert_equal(single.vectors(embedding, None)[0], single.modulated_by().alone(embedding)[0])
    assert products == [1]


def test_what_was_made_before_a_graph_is_captured_is_no_part_of_it(
    flux: nn.Module, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    single = flux.get_submodule(SINGLE)
    embedding = torch.randn(1, single.norm.linear.in_features)
    with torch.no_grad():
        before = single._modulations.of(single, embedding)
        assert before is not None
        monkeypatch.setattr(modulation, "_is_captured", lambda tensor: True)
        assert single._modulations.of(single, embedding) is None  # the block makes them, in the graph
        of_the_graph = single._modulations.of(single, embedding.clone())
        monkeypatch.setattr(modulation, "_is_captured", lambda tensor: False)
        assert_equal(single._modulations.of(single, embedding), before)
    assert of_the_graph is not None


def test_none_are_made_ahead_where_gradients_may_be_asked_for(flux: nn.Module, products: list[int]) -> None:
    single = flux.get_submodule(SINGLE)
    embedding = torch.randn(1, single.norm.linear.in_features)
    single.vectors(embedding, None)
    assert products == []


def test_copies_share_nothing_with_their_model(flux: nn.Module, run: Run, products: list[int]) -> None:
    expected = run(flux)
    copied, unpickled = copy.deepcopy(flux), pickle.loads(pickle.dumps(flux))
    run(flux)
    del flux
    for model in (copied, unpickled):
        run(model)
        products.clear()
        assert_equal(run(model), expected)
        assert products == [4]  # all but the first block; in a copy, the layers of a double block are two weights


def test_blocks_elsewhere_are_left_out(flux: nn.Module, run: Run, products: list[int]) -> None:
    run(flux)
    double, single = flux.get_submodule(DOUBLE), flux.get_submodule(SINGLE)
    flux.get_submodule("transformer_blocks.1").to("meta")
    products.clear()
    embedding = torch.randn(1, single.norm.linear.in_features)
    with torch.no_grad():
        double.vectors(embedding, None)
        single.vectors(embedding, None)
    assert products == [2]  # both single blocks


def test_blocks_with_a_forward_of_somebody_s_are_left_out(flux: nn.Module, run: Run, products: list[int]) -> None:
    expected = run(flux)
    block = flux.get_submodule("transformer_blocks.1")
    vars(block)["forward"] = type(block).forward.__get__(block)
    assert_equal(run(flux), expected)
    assert products == [2]


def test_compiled_blocks_are_handed_nothing_that_a_hook_might_change(flux: nn.Module, run: Run) -> None:
    def louder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"temb": 2 * kwargs["temb"]}

    plain = run(flux)
    flux.get_submodule(SINGLE).register_forward_pre_hook(louder, with_kwargs=True)
    expected = run(flux)
    assert not torch.equal(expected, plain)
    flux.compile_repeated_blocks(backend="eager")
    for _ in range(2):
        assert_equal(run(flux), expected)


def test_an_embedding_that_was_written_to_unseen_is_read_again(flux: nn.Module) -> None:
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    with torch.inference_mode():
        embedding = torch.randn(1, blocks[0].norm1.linear.in_features)
        for _ in range(3):
            embedding.normal_()
            for block in blocks:
                assert_equal(block.vectors(embedding, None)[0], block.modulated_by().alone(embedding)[0])


def test_an_embedding_keeps_no_block_alive(flux: nn.Module, run: Run) -> None:
    run(flux)
    embedding = torch.randn(1, flux.get_submodule(SINGLE).norm.linear.in_features)
    with torch.no_grad():
        for name in (DOUBLE, SINGLE):
            flux.get_submodule(name).vectors(embedding, None)
    modulations, block = flux.get_submodule(DOUBLE)._modulations, weakref.ref(flux.get_submodule(DOUBLE))
    flux.transformer_blocks = nn.ModuleList()
    assert block() is None
    assert modulations._made[embedding].vectors is not None


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.gpu
@ON_GPU
def test_a_product_of_all_has_the_bits_of_each_alone_on_a_gpu(flux: nn.Module, products: list[int]) -> None:
    flux.cuda()
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    embeddings = torch.randn(3, 5, blocks[0].norm1.linear.in_features, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for embedding in embeddings:
            for block in blocks:
                assert_equal(block._modulations.of(block, embedding), block.modulated_by().alone(embedding))
    assert products == [3, 3]


@pytest.mark.gpu
@ON_GPU
def test_a_block_captured_alone_reads_what_its_embedding_holds_at_each_replay(flux: nn.Module) -> None:
    single = flux.cuda().get_submodule(SINGLE)
    embedding = torch.randn(1, single.norm.linear.in_features, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        single.vectors(embedding, None)
        single.vectors(embedding.clone(), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            shift, *_ = single.vectors(embedding, None)
        for _ in range(2):
            embedding.normal_()
            graph.replay()
            assert_equal(shift, single.modulated_by().alone(embedding)[0])
