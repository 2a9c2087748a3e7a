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


def ddp_worker(rank, world, port, folder):
    import os

    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
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
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(ddp_worker, (2, port, tmp_path), nprocs=2)
    model, rows = torch.load(tmp_path / "model.pt", weights_only=False)
    model(rows).square().mean().backward()
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(torch.load(tmp_path / "grads.pt"), reference)


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
