"""LoRA layers under what torch does to modules: compilation, copies, checkpoints of activations, autocast, DDP."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from conftest import relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from phinetune import lora
from phinetune.layers.projection import computing_dtype

# name -> (how it is made, what it is given)
LAYERS = {
    "Linear": (partial(lora.Linear, 8, 6, r=2), (3, 8)),
    "Linear, rslora": (partial(lora.Linear, 8, 6, r=2, use_rslora=True), (3, 8)),
    "Linear, dora": (partial(lora.Linear, 8, 6, r=2, use_dora=True), (3, 8)),
    "Linear, pissa": (partial(lora.Linear, 8, 6, r=2, init_lora_weights="pissa"), (3, 8)),
    "Linear, olora": (partial(lora.Linear, 8, 6, r=2, init_lora_weights="olora"), (3, 8)),
    "Linear, fan_in_fan_out": (partial(lora.Linear, 8, 6, r=2, fan_in_fan_out=True), (3, 8)),
    "MergedLinear": (partial(lora.MergedLinear, 8, 6, r=2, enable_lora=[True, False]), (3, 8)),
    "MergedLinear, ranks": (
        partial(lora.MergedLinear, 8, 9, r=[1, 0, 3], lora_alpha=[1, 1, 2], enable_lora=[1] * 3, out_splits=[4, 2, 3]),
        (3, 8),
    ),
    "MergedLinear, dora": (partial(lora.MergedLinear, 8, 6, r=2, enable_lora=[0, 1, 1], use_dora=True), (3, 8)),
    "Embedding": (partial(lora.Embedding, 8, 6, r=2), None),
    "Embedding, dora": (partial(lora.Embedding, 8, 6, r=2, use_dora=True, max_norm=2.0), None),
    "Conv1d": (partial(lora.Conv1d, 4, 6, 3, r=2), (2, 4, 5)),
    "Conv2d, peft": (partial(lora.Conv2d, 4, 6, 3, r=2, layout="peft", groups=2, padding=1), (2, 4, 5, 5)),
    "Conv2d, dora": (partial(lora.Conv2d, 4, 6, 3, r=2, layout="peft", use_dora=True), (2, 4, 5, 5)),
    "Conv3d": (partial(lora.Conv3d, 4, 6, 2, r=2), (2, 4, 3, 3, 3)),
}  # fmt: skip


# torch 2.13 instantiates an autograd function while it traces one, against its own advice.
DYNAMOS_OWN = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(params=LAYERS)
def made(request):
    """(a layer away from its beginning, its input)."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer = make()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    lora.mark_only_lora_as_trainable(layer)
    return layer, torch.randint(0, 8, (3, 4)) if shape is None else torch.randn(shape)


def gradients(layer, x, call=None):
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x) if call is None else call(x)
    y.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def same(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


def test_merged_and_unmerged_answer_alike_and_a_dense_layer_too(made):
    layer, x = made
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)
        plain = layer.to_base()
        assert type(plain) is type(layer)._plain_type
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
        plain64, layer64 = copy.deepcopy(plain).double(), copy.deepcopy(layer.train()).double()
        x64 = x.double() if x.is_floating_point() else x
        assert relative_error(layer64(x64), plain64(x64)) < 1e-6


def test_half_precision_and_double(made):
    layer, x = made
    x = x.double() if x.is_floating_point() else x
    reference = gradients(layer.double(), x)
    expected = layer(x).detach()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)):
        layer.to(dtype)
        own_x = x.to(dtype) if x.is_floating_point() else x
        assert layer(own_x).dtype == dtype
        assert relative_error(layer(own_x).detach(), expected) < tolerance
        for name, gradient in gradients(layer, own_x).items():
            assert gradient.dtype == dtype
            assert relative_error(gradient, reference[name]) < 2 * tolerance, name


@DYNAMOS_OWN
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled(made, mode):
    layer, x = made
    layer.train(mode == "train")
    expected = layer(x).detach()
    reference = gradients(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-5, atol=1e-5)
    same(gradients(layer, x, compiled), reference, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected, rtol=1e-5, atol=1e-5)


@DYNAMOS_OWN
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_by_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(lora.Linear(8, 16, r=2), nn.ReLU(), lora.MergedLinear(16, 6, r=2, enable_lora=[True, False]))
    x = torch.randn(5, 8)
    reference = gradients(model, x)
    torch.compiler.reset()
    same(gradients(model, x, torch.compile(model, fullgraph=True)), reference, 1e-5)


def test_copies_and_pickles_answer_alike_and_share_nothing(made):
    layer, x = made
    for mode in (True, False):
        layer.train(mode)
        with torch.no_grad():
            expected = layer(x)
            saved = io.BytesIO()
            torch.save(layer, saved)
            saved.seek(0)
            copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
            for again in copies:
                assert again.training == mode
                torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
                again.lora_B.mul_(2)
                assert not torch.equal(again(x), expected), "the copy follows its own parameters"
            assert torch.equal(layer(x), expected)


def test_safetensors_and_a_strict_load(made, tmp_path):
    layer, x = made
    save_file(layer.eval().state_dict(), tmp_path / "layer.safetensors")
    again = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.normal_()
        again.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert torch.equal(again(x), layer(x))


def test_made_on_meta(made, request):
    layer, x = made
    with torch.device("meta"):
        empty = LAYERS[request.node.callspec.params["made"]][0]()
    assert {name: p.shape for name, p in empty.state_dict().items()} == {
        name: p.shape for name, p in layer.state_dict().items()
    }
    for again in (copy.deepcopy(empty).to_empty(device="cpu"), copy.deepcopy(empty)):
        assign = next(again.parameters()).is_meta
        again.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=assign)
        assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations(made, use_reentrant):
    layer, x = made
    reference = gradients(layer, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.tap = layer, nn.Parameter(torch.ones(()))

        def forward(self, x):
            tapped = x * self.tap if x.is_floating_point() else x
            if use_reentrant and not x.is_floating_point():  # ids ask for no gradient: the weight's stand-in does
                return checkpoint(lambda ids, tap: self.layer(ids) * tap, x, self.tap, use_reentrant=True)
            return checkpoint(self.layer, tapped, use_reentrant=use_reentrant)

    model = Model()
    found = gradients(model, x)
    same({n.removeprefix("layer."): g for n, g in found.items() if n.startswith("layer.")}, reference)


def test_dropout_is_the_same_when_recomputed():
    torch.manual_seed(0)
    layer = lora.Linear(64, 64, r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 64, requires_grad=True)
    found = []
    for call in (
        layer,
        partial(checkpoint, layer, use_reentrant=False),
        partial(checkpoint, layer, use_reentrant=True),
    ):
        torch.manual_seed(1)
        found.append(gradients(layer, x, call))
    same(found[0], found[1])
    same(found[0], found[2])


def test_autocast(made):
    layer, x = made
    reference = gradients(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        found = gradients(layer, x)
    assert y.dtype == (torch.float32 if isinstance(layer, nn.Embedding) else torch.bfloat16)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, reference[name]) < 5e-2, name


def ddp_worker(rank, world, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        lora.Linear(8, 8, r=2, use_dora=True),
        lora.MergedLinear(8, 6, r=2, enable_lora=[1, 0, 1]),
        lora.Linear(6, 6, r=2, init_lora_weights="pissa"),
    )
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.3)
    lora.mark_only_lora_as_trainable(model)
    rows = torch.arange(32.0).view(4, 8).sin()
    parallel = DistributedDataParallel(model)
    parallel(rows[rank::world]).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, folder / "grads.pt")
        torch.save((model, rows), folder / "model.pt")
    dist.barrier()  # gloo aborts a process whose peer is still at work
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    mp.spawn(ddp_worker, (2, tmp_path), nprocs=2)
    model, rows = torch.load(tmp_path / "model.pt", weights_only=False)
    model(rows).square().mean().backward()
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(torch.load(tmp_path / "grads.pt"), reference)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_func(made, mode):
    """Gradients of each row alone, a loop's; forward mode, finite differences'; and a vmap over layers, each one's."""
    layer, x = made
    layer.double().train(mode == "train")
    x = x.double() if x.is_floating_point() else x
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x[:, None])
    for i, row in enumerate(x):
        found = gradients(layer, row[None])
        same({name: gradient[i] for name, gradient in each.items()}, found)

    tangent = {name: torch.randn_like(p) for name, p in trained.items()}
    _, slope = torch.func.jvp(lambda parameters: loss(parameters, x), (trained,), (tangent,))
    if not any(adapter.use_dora for adapter in layer.adapters.values()):  # whose norms are constants to autograd
        ahead, behind = ({name: p + h * tangent[name] for name, p in trained.items()} for h in (1e-5, -1e-5))
        torch.testing.assert_close(slope, (loss(ahead, x) - loss(behind, x)) / 2e-5, rtol=1e-4, atol=1e-6)

    two = {name: torch.stack([p, 2 * p]) for name, p in trained.items()}
    with torch.no_grad():
        stacked = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(two)
        for i in range(2):
            alone = torch.func.functional_call(layer, {name: p[i] for name, p in two.items()}, (x,))
            torch.testing.assert_close(stacked[i], alone, rtol=1e-6, atol=1e-6)


def test_a_gradient_penalty_is_that_of_the_dense_layer(made):
    """Double backward: `create_graph=True`, in a loss of the gradients themselves."""
    layer, x = made
    if any(adapter.use_dora for adapter in layer.adapters.values()):
        pytest.skip("DoRA's norms are constants to autograd, in the dense layer they aren't")
    layer.double()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    names = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def penalties(call, weights):
        first = torch.autograd.grad(call().sin().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(names.values()))

    def dense():
        plain, weight = layer.to_base(), layer._base_weight + layer.delta_weight()
        weight = weight if weight.shape == plain.weight.shape else weight.T
        return torch.func.functional_call(plain, {"weight": weight}, (x,))

    weights = [*names.values(), *([x] if x.requires_grad else [])]
    for found, expected in zip(penalties(lambda: layer(x), weights), penalties(dense, weights), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected)


def test_shapes_on_meta(made, request):
    layer, x = made
    expected = layer(x)
    found = layer.to("meta")(x.to("meta"))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert computing_dtype(x.to("meta")) == x.dtype


def test_loads_nothing_but_torch():
    code = [sys.executable, "-X", "importtime", "-c", "import phinetune.lora"]
    lines = subprocess.run(code, check=True, capture_output=True, text=True).stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"torch", "phinetune"} <= loaded
    foreign = {"transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "pydantic", "tokenizers", "rich"}
    assert not foreign & loaded


def test_torchs_fused_encoder_layer_does_not_pass_the_adapters_by():
    """nn.TransformerEncoderLayer reads its weights past the layers when it can, in eval mode without gradients."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    lora.adapt(model, ["linear1", "linear2"], r=2)
    with torch.no_grad():
        nn.init.normal_(model.linear1.lora_B)
    x = torch.randn(2, 5, 8)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(lora.TargetError, match="MultiheadAttention reads this weight without calling the layer"):
        lora.adapt(nn.TransformerEncoderLayer(8, 2, 16), "all-linear", r=2)


def test_autocast_does_not_round_the_merged_weight():
    """And DoRA's norms, which every training step needs."""
    torch.manual_seed(0)
    for use_dora in (False, True):
        layer = lora.Linear(64, 64, r=4, use_dora=use_dora, bias=False)
        nn.init.normal_(layer.lora_B)
        expected, scale = layer.merge_weight(), layer._dora_scale("default") if use_dora else None
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert torch.equal(layer.merge_weight(), expected)
            layer.eval()
            assert torch.equal(layer._merged_weight(), expected)
            if use_dora:
                assert torch.equal(layer._dora_scale("default"), scale)


def test_small_changes_of_doras_magnitude_are_not_rounded_away():
    torch.manual_seed(0)
    layer = lora.Linear(64, 64, r=4, use_dora=True, bias=False).to(torch.bfloat16)
    layer.lora_magnitude_vector.data = layer.lora_magnitude_vector.data.float() * 1.002
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        plain, tuned = x.float() @ layer.weight.float().T, layer(x).float()
    ratio = (plain * tuned).sum() / (plain * plain).sum()
    assert ratio.item() == pytest.approx(1.002, abs=3e-4)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_a_base_that_comes_later_begins_what_depends_on_it_anew(settings):
    torch.manual_seed(0)
    x, base = torch.randn(3, 8), nn.Linear(8, 8)
    for make in (lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)).double().float()):
        fresh = make(lora.Linear(8, 8, r=2, **settings))
        fresh.load_state_dict(base.state_dict(), strict=False)
        torch.testing.assert_close(fresh(x), base(x), rtol=1e-5, atol=1e-5)
        trained = lora.Linear(8, 8, r=2, **settings)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
        trained = make(trained)
        before = {name: value.clone() for name, value in lora.lora_state_dict(trained).items()}
        trained.load_state_dict(base.state_dict(), strict=False)
        assert all(torch.equal(value, before[name]) for name, value in lora.lora_state_dict(trained).items())


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_taken_in_eval_mode_shows(fused):
    torch.manual_seed(0)
    layer = lora.Linear(8, 8, r=2).eval()
    nn.init.normal_(layer.lora_B)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=fused)
    x = torch.randn(3, 8)
    for _ in range(3):
        layer(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer._adapted(x), rtol=1e-5, atol=1e-5)
            layer.scaling = layer.scaling * 2
            torch.testing.assert_close(layer(x), layer._adapted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_taken_behind_a_merge_shows(kind, fused):
    """As where several copies of a model are averaged: nothing asks for a gradient between merge, step and use."""
    torch.manual_seed(0)
    layer = lora.Linear(8, 8, r=2)
    nn.init.normal_(layer.lora_B)
    optimizer = kind([layer.lora_A, layer.lora_B], lr=0.1, fused=fused)
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        optimizer.step()
        assert relative_error(layer(x), before) > 0.01
        torch.testing.assert_close(layer(x), layer._adapted(x), rtol=1e-5, atol=1e-5)


def test_a_merged_weight_that_does_not_train_stays_while_others_step():
    frozen, other = lora.Linear(8, 8, r=2).requires_grad_(False).eval(), nn.Linear(4, 4)
    merged = frozen._merged_weight()
    other(torch.randn(2, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), fused=True).step()
    assert frozen._merged_weight() is merged


def test_dora_on_a_base_with_an_output_of_zeros():
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    with torch.no_grad():
        base.weight[2] = 0
    layer = lora.Linear.from_base(base, r=2, use_dora=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), base(x))
    found = gradients(layer, x)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["lora_B"][2].norm() > 0, "the output can learn"
    with torch.no_grad():
        torch.testing.assert_close(layer.merge_weight(), base.weight)
        layer.lora_B.add_(0.1)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(
    "option", [{"padding_idx": 1}, {"scale_grad_by_freq": True}, {"sparse": True}, {"max_norm": 0.5}]
)
def test_an_embedding_that_trains_too_has_nn_embeddings_gradient(option):
    torch.manual_seed(0)
    plain = nn.Embedding(10, 4, **option)
    layer = lora.Embedding(10, 4, r=2, _weight=plain.weight.detach().clone(), **option)
    layer.weight.requires_grad_(True)
    ids = torch.tensor([[1, 1, 3], [3, 3, 7]])
    dy = torch.randn(2, 3, 4)
    for module in (layer, plain):
        module(ids).backward(dy)
    if "max_norm" in option:  # torch bounds the rows first, out of autograd's sight; here that is part of the function
        rows = layer.weight.detach().clone().requires_grad_()
        bounded = rows * (0.5 / rows.norm(dim=1, keepdim=True)).clamp(max=1)
        bounded[ids].backward(dy)
        torch.testing.assert_close(layer.weight.grad, rows.grad, rtol=1e-4, atol=1e-5)
    else:
        assert layer.weight.grad.is_sparse == plain.weight.grad.is_sparse
        torch.testing.assert_close(layer.weight.grad.to_dense(), plain.weight.grad.to_dense())


def test_parameters_drawn_again_are_drawn_in_the_layout_of_the_storage():
    for settings in ({}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        layer = lora.Linear(12, 4, r=2, fan_in_fan_out=True, **settings)
        layer.reset_parameters()
        assert layer.weight.shape == (12, 4)
        assert layer.weight.is_contiguous()
        x = torch.randn(3, 12)
        torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias, rtol=1e-5, atol=1e-5)


def test_settings_of_parts_and_of_plain_layers():
    layer = lora.MergedLinear(8, 9, r=2, lora_alpha=[2, 4, 8], enable_lora=[1, 1, 1])
    assert layer.scaling == [1, 2, 4]
    with pytest.raises(ValueError, match=r"lora_alpha=\[1, 2\]: must be one value, or one for each of 3 ranks"):
        lora.MergedLinear(8, 9, r=[1, 2, 3], lora_alpha=[1, 2], enable_lora=[1, 1, 1])
    with pytest.raises(ValueError, match=r"r=\[1, 2\]: must be one rank, or one for each of 3 parts"):
        lora.MergedLinear(8, 9, r=[1, 2], enable_lora=[1, 1, 1])
    plain = lora.Linear(8, 8, lora_alpha=4)
    assert (plain.r, plain.lora_alpha, plain.has_lora) == (0, 4, False)
    emptied = [lora.Linear.from_base(nn.Linear(8, 8), r=2) for _ in range(2)]
    for layer in emptied:
        layer.delete_adapter("default")
    emptied[0].scaling = 3.0
    assert emptied[1].scaling == 0, "what one plain layer is told is not the others'"
    whole = lora.MergedLinear.from_base(nn.Linear(8, 8), r=4)
    assert "enable_lora=[True]" in repr(whole)
    off = lora.Linear(8, 8, r=2)
    nn.init.normal_(off.lora_B)
    off.scaling = 0
    x = torch.randn(3, 8)
    torch.testing.assert_close(off(x), nn.functional.linear(x, off.weight, off.bias))
    assert not off.product().lora_B.any()
