# %% [markdown]
# # loralib, step by step
#
# The guide begins with [loralib](https://github.com/microsoft/LoRA): put its layers in a model, mark them as trainable,
# save and load only them. Its snippets stand below in a model that trains; of what they take from loralib, the import
# is the only line that has changed.
#
# **What was broken.** loralib has had no release since 2023, and 34 things go wrong in it, most of them silently: a
# state dict taken after `eval()` holds the update twice, every `eval()` moves the base a little, `MergedLinear` takes
# equal parts only, so that grouped-query attention adapts the wrong rows. docs/loralib.md lists them, each with a test.
#
# **What changed.** `phinetune.lora` has the same layers, draws the same numbers from the same seed, reads loralib's
# checkpoints, and has none of the 34. The last section does by one call what the snippets do by hand.

# %%
import os

import torch
from torch import nn

import phinetune
import phinetune.lora as lora  # in place of: import loralib as lora
from phinetune.model import fused_parts

MODEL = os.environ.get("MODEL", "microsoft/Phi-3-mini-4k-instruct")  # MODEL=smollm2 needs no network

# %% [markdown]
# ## A layer

# %%
in_features, out_features = 768, 768

# ===== Before =====
# layer = nn.Linear(in_features, out_features)
# ===== After ======
# Add a pair of low-rank adaptation matrices with rank r=16
layer = lora.Linear(in_features, out_features, r=16)
print(layer)
print({name: tuple(parameter.shape) for name, parameter in layer.named_parameters()})

# %% [markdown]
# ## A model
#
# A chat model is loaded, and the layers that read and write its attention are replaced. Phi-3 keeps query, key and
# value in one `nn.Linear`, for which there is `MergedLinear`: here query and value get an update, key does not, as in
# the LoRA paper.

# %%
model, tokenizer = phinetune.load(MODEL)


def adapted(plain: nn.Linear, parts: dict[str, int] | None = None, chosen: tuple[str, ...] = ()) -> nn.Linear:
    """A layer of lora's with the weight of a plain one; `parts` of a fused one, and which of them are adapted."""
    size = {"in_features": plain.in_features, "out_features": plain.out_features, "bias": plain.bias is not None}
    if parts is None:
        new = lora.Linear(**size, r=16, lora_alpha=32)
    else:
        flags = [name in chosen for name in parts]
        new = lora.MergedLinear(**size, r=16, lora_alpha=32, enable_lora=flags, out_splits=list(parts.values()))
    new.load_state_dict(plain.state_dict(), strict=False)
    new.weight.data = plain.weight.data  # the weight itself, in its own dtype
    return new


config = model.config
width = config.hidden_size // config.num_attention_heads
qkv = {
    "q": config.num_attention_heads * width,
    "k": config.num_key_value_heads * width,
    "v": config.num_key_value_heads * width,
}
for block in model.model.layers:
    attention = block.self_attn
    if hasattr(attention, "qkv_proj"):  # Phi-3
        attention.qkv_proj = adapted(attention.qkv_proj, qkv, ("q", "v"))
    else:
        attention.q_proj, attention.v_proj = adapted(attention.q_proj), adapted(attention.v_proj)
print(model.model.layers[0].self_attn)

# %% [markdown]
# ## Training
#
# Only the LoRA layers' own parameters are marked. The batch below is one chat, repeated, so that the loss says whether
# the layers learn; real training is what the other samples do.

# %%
# This sets requires_grad to False for all parameters but the LoRA layers' own
lora.mark_only_lora_as_trainable(model)
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in trainable):,} of {sum(p.numel() for p in model.parameters()):,} parameters train")

chat = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model with an adapter of its own."},
]
ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"].to(model.device)
dataloader = [ids] * 12

optimizer = torch.optim.AdamW(trainable, lr=1e-3)
model.train()
# Training loop
for batch in dataloader:
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{loss.item():.3f}", end=" ")

# %% [markdown]
# ## Saving and loading

# %%
model.eval()
checkpoint_path = "ckpt_lora.pt"

# ===== Before =====
# torch.save(model.state_dict(), checkpoint_path)
# ===== After =====
torch.save(lora.lora_state_dict(model), checkpoint_path)
print(f"{os.path.getsize(checkpoint_path) / 1e6:.1f} MB, of a model of {model.get_memory_footprint() / 1e6:,.0f} MB")

with torch.no_grad():
    tuned = model(ids).logits
    for parameter in trainable:
        parameter.zero_()
    assert not torch.equal(model(ids).logits, tuned)

# Load the pretrained checkpoint first, which phinetune.load did; then load the LoRA checkpoint
model.load_state_dict(torch.load("ckpt_lora.pt"), strict=False)
with torch.no_grad():
    print("the same answers as before it was saved:", torch.equal(model(ids).logits, tuned))

# strict=False says nothing of a name that isn't the model's. This loads the same, and would.
print(lora.load_lora_state_dict(model, torch.load("ckpt_lora.pt")))

# %% [markdown]
# ## The same by one call
#
# Names are PEFT's; `q_proj` and `v_proj` mean their rows of Phi-3's fused layer.

# %%
fresh, _ = phinetune.load(MODEL)
names = lora.adapt(fresh, ["q_proj", "v_proj"], r=16, lora_alpha=32, fused=fused_parts(fresh.config))
print(f"{len(names)} layers: {names[0]} … {names[-1]}")
lora.load_lora_state_dict(fresh, torch.load("ckpt_lora.pt"))
lora.fuse(fresh)  # W + BA as one weight, as loralib's layers have it behind eval()
with torch.no_grad():
    print("the same answers again:", torch.equal(fresh(ids).logits, tuned))
os.remove(checkpoint_path)
