"""The guide's walk through loralib, run as written: the import is the only line that changes."""

import loralib
import pytest
import torch
from torch import nn

SNIPPETS = """
import loralib as lora

# Add a pair of low-rank adaptation matrices with rank r=16
layer = lora.Linear(in_features, out_features, r=16)
---
import loralib as lora
model = BigModel()
# This sets requires_grad to False for all parameters without the string "lora_" in their names
lora.mark_only_lora_as_trainable(model)
# Training loop
for batch in dataloader:
    train_on(batch)
---
torch.save(lora.lora_state_dict(model), checkpoint_path)
---
# Load the pretrained checkpoint first
model.load_state_dict(torch.load('ckpt_pretrained.pt'), strict=False)
# Then load the LoRA checkpoint
model.load_state_dict(torch.load('ckpt_lora.pt'), strict=False)
"""
FIRST_LAYER, TRAIN, SAVE, LOAD = SNIPPETS.split("---\n")
ROWS, CHANNELS = torch.arange(40), 3


def big_model(lora):
    """A model that uses every layer of the guide."""

    class BigModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = lora.Embedding(40, 3 * 8 * 8, r=4)
            self.conv = lora.Conv2d(CHANNELS, 4, 3, r=2, padding=1)
            self.qkv_proj = lora.MergedLinear(4 * 8 * 8, 3 * 16, r=8, enable_lora=[True, False, True])
            self.norm = nn.LayerNorm(48)
            self.layer = lora.Linear(48, 5, r=16)

        def forward(self, ids):
            images = self.embed(ids).view(-1, CHANNELS, 8, 8)
            return self.layer(self.norm(self.qkv_proj(self.conv(images).relu().flatten(1))))

    return BigModel


def run(snippet, library, names):
    exec(snippet.replace("import loralib as lora", f"import {library} as lora"), names)
    return names


@pytest.mark.parametrize("library", ["phinetune.lora", "loralib"])
def test_the_guides_snippets_train_save_and_load(library, tmp_path, monkeypatch):
    import phinetune.lora

    lora = phinetune.lora if library == "phinetune.lora" else loralib
    monkeypatch.chdir(tmp_path)
    assert isinstance(run(FIRST_LAYER, library, {"in_features": 6, "out_features": 7})["layer"], nn.Linear)

    BigModel, losses = big_model(lora), []
    torch.manual_seed(0)
    pretrained = BigModel()
    torch.save(
        {name: value for name, value in pretrained.state_dict().items() if "lora_" not in name}, "ckpt_pretrained.pt"
    )
    targets = torch.randn(40, 5)
    names = {
        "BigModel": lambda: pretrained,
        "dataloader": [ROWS] * 60,
        "torch": torch,
        "checkpoint_path": "ckpt_lora.pt",
    }
    optimizer = torch.optim.AdamW([p for n, p in pretrained.named_parameters() if "lora_" in n], lr=0.02)

    def train_on(batch):
        loss = (names["model"](batch) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    names["train_on"] = train_on
    run(TRAIN, library, names)
    assert losses[-1] < 0.5 * losses[0]
    trained = {name for name, parameter in pretrained.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in pretrained.named_parameters() if "lora_" in name}
    run(SAVE, library, names)

    with torch.no_grad():
        expected = names["model"](ROWS)
    torch.manual_seed(1)
    names["model"] = BigModel()
    with torch.no_grad():
        assert (names["model"](ROWS) - expected).abs().max() > 0.1
        run(LOAD, library, names)
        torch.testing.assert_close(names["model"](ROWS), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(names["model"].eval()(ROWS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved_by", ["phinetune.lora", "loralib"])
def test_checkpoints_of_one_library_load_in_the_other(saved_by):
    import phinetune.lora

    libraries = {"phinetune.lora": phinetune.lora, "loralib": loralib}
    torch.manual_seed(0)
    writer = big_model(libraries[saved_by])()
    with torch.no_grad():
        for name, parameter in writer.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    state = libraries[saved_by].lora_state_dict(writer)
    for name, library in libraries.items():
        torch.manual_seed(0)  # the same seed draws the same base
        reader = big_model(library)()
        found = reader.load_state_dict(state, strict=False)
        assert not found.unexpected_keys, name
        assert all("lora_" not in key for key in found.missing_keys)
        torch.testing.assert_close(reader(ROWS), writer(ROWS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_parameters_train_and_are_saved(bias):
    import phinetune.lora

    models = []
    for library in (loralib, phinetune.lora):
        model = nn.Sequential(library.Linear(4, 4, r=2), nn.Linear(4, 4), nn.LayerNorm(4))
        library.mark_only_lora_as_trainable(model, bias)
        models.append((library, model))
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for _, model in models]
    assert trained[0] == trained[1]
    saved = [library.lora_state_dict(model, bias).keys() for library, model in models]
    assert saved[0] == saved[1]
