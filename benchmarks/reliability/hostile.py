"""Row 10: models, adapters, checkpoints, templates and data from somebody who means harm.

Each artefact is a model, a run or data that are whole but for what is planted in them, and is given to the command
line as a user would.  None may run code, none may have a file outside its folder opened, and what can't be used must
be refused at once.
"""

import ctypes
import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forked
from subject import Subject, phinetune

AT_ONCE = 1.0  # seconds
DEEP = "[" * 100_000 + "]" * 100_000
IN_OPEN = 0x20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Artefact:
    """`plant` spoils a copy of a model, run or data file; `refused` is False where it may as well have no effect."""

    name: str
    kind: str
    plant: Callable[[Path], object]
    refused: bool = True


class Traps:
    """What must not happen: a file that code would make, and files outside that nobody may open."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.canary = folder / "outside", folder / "code-was-run"
        self.folder.mkdir()
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / name, self.folder / name)
        self.templates = self.folder / "templates"
        self.templates.mkdir()
        (self.templates / "tool.jinja").write_text("{{ messages }}")
        self._libc = ctypes.CDLL(None)
        self._events = self._libc.inotify_init1(os.O_NONBLOCK)
        for path in (self.folder, self.templates):
            assert self._libc.inotify_add_watch(self._events, str(path).encode(), IN_OPEN) >= 0

    @property
    def command(self) -> str:
        return f"touch {self.canary}"

    def sprung(self) -> str:
        """What has happened since the last call."""
        try:
            opened = bool(os.read(self._events, 1 << 16))
        except BlockingIOError:
            opened = False
        ran = self.canary.exists()
        self.canary.unlink(missing_ok=True)
        return ", ".join(
            words for words, true in (("code was run", ran), ("a file outside was opened", opened)) if true
        )


def attack(given: Subject, model: Path, one_in: int) -> dict[str, Any]:
    """Every artefact (or one in so many) through the command line."""
    traps = Traps(given.folder, model)
    run, not_refused, late, slowest, tried = 0, 0, 0, 0.0, 0
    for number, artefact in enumerate(list(artefacts(traps))[::one_in]):
        place = given.folder / f"hostile-{number}"
        arguments = prepare(artefact, place, given, model)
        traps.sprung()
        begin = time.monotonic()
        trial = forked.start(partial(phinetune, arguments), place.with_suffix(".txt"))
        code = trial.ends_within(20)
        took = time.monotonic() - begin
        if code is None:
            trial.kill()
            trial.wait()
        tried += 1
        faults = [sprung] if (sprung := traps.sprung()) else []
        run += bool(faults)
        text = trial.text()
        is_refused = code in (1, 2) and any(line.startswith("error: ") for line in text.splitlines())
        if "Traceback" in text or code not in (0, 1, 2) or (artefact.refused and not is_refused):
            not_refused += 1
            faults.append(f"ends with {code}")
        if is_refused:
            slowest = max(slowest, took)
        if took > AT_ONCE and (is_refused or code is None):
            late += 1
            faults.append(f"took {took:.1f} s")
        if faults:
            print(f"hostile: {artefact.kind} {artefact.name}: {', '.join(faults)}: {text[-1500:]}", flush=True)
        shutil.rmtree(place)
    return {
        "hostile": tried,
        "hostile_run": run,
        "hostile_not_refused": not_refused,
        "hostile_late": late,
        "hostile_slowest_seconds": round(slowest, 2),
    }


def prepare(artefact: Artefact, place: Path, given: Subject, model: Path) -> list[str]:
    """The spoilt copy, and the command that is given it."""
    place.mkdir()
    recipe = str(given.folder / "recipe.yaml")
    base = ["train", recipe, f"output_dir={place / 'out'}", "max_steps=1"]
    copy = place / "given"
    if artefact.kind == "model":
        shutil.copytree(model, copy)
        artefact.plant(copy)
        return [*base, f"model={copy}"]
    if artefact.kind == "gguf":
        copy.mkdir()
        artefact.plant(copy)
        return [*base, f"model={copy / 'model.gguf'}"]
    if artefact.kind == "run":
        shutil.copytree(given.folder / "whole", copy)
        artefact.plant(copy)
        return ["chat", str(copy), "--prompt", "What is 1 plus 2?", "--max-new-tokens", "2"]
    if artefact.kind == "checkpoint":
        shutil.copytree(given.folder / "whole", copy)
        checkpoint = max(copy.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        artefact.plant(checkpoint)
        return ["train", recipe, f"output_dir={copy}", "--resume", str(checkpoint)]
    copy.mkdir()
    artefact.plant(copy)
    return [*base, f"data.train={next(copy.iterdir())}"]


def artefacts(traps: Traps) -> Iterator[Artefact]:
    for of in (pickles, code, jinja, paths, bombs):
        yield from of(traps)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickles(traps: Traps) -> Iterator[Artefact]:
    data = pickle.dumps(Payload(traps.command))

    def archive(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", data)
            file.writestr("archive/version", "3\n")

    def alone(name: str) -> Callable[[Path], None]:
        def plant(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            (folder / name).write_bytes(data)

        return plant

    def written(name: str, content: bytes = data) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(content)

    for name in ("pytorch_model.bin", "model.bin", "pytorch_model.pt", "model.pth", "consolidated.00.pth",
                 "model.ckpt", "weights.pkl", "model.pickle", "tf_model.h5", "flax_model.msgpack", "model.joblib",
                 "model.npy"):  # fmt: skip
        yield Artefact(f"a pickle as {name}", "model", alone(name))
    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX):
        yield Artefact(f"a pickle called {name}", "model", written(name))
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        yield Artefact(f"a pickle called {name}", "model", written(name), refused=False)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        yield Artefact(f"a pickle beside the weights, {name}", "model", written(name), refused=False)

    def archived(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        archive(folder / "pytorch_model.bin")

    yield Artefact("torch's archive", "model", archived)
    yield Artefact("torch's archive called model.safetensors", "model", lambda folder: archive(folder / WEIGHTS))

    for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"):

        def adapter_alone(folder: Path, name: str = name) -> None:
            (folder / "adapter_model.safetensors").unlink()
            (folder / name).write_bytes(data)

        yield Artefact(f"a pickle as {name}", "run", adapter_alone)
    for name in ("adapter_model.safetensors", "adapter_config.json", "chat_format.json", "recipe.yaml",
                 "tokenizer.json", "tokenizer_config.json"):  # fmt: skip
        yield Artefact(f"a pickle called {name}", "run", written(name))
    for name in ("parameters.safetensors", "optimizer.safetensors", "state.json"):
        yield Artefact(f"a pickle called {name}, in the manifest", "checkpoint", proven(written(name)))
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        yield Artefact(f"a pickle beside the rest, {name}", "checkpoint", proven(written(name)), refused=False)


def code(traps: Traps) -> Iterator[Artefact]:
    source = f"import os\nos.system({traps.command!r})\nclass Evil: pass\n"

    def with_module(*changes: tuple[str, dict[str, Any]]) -> Callable[[Path], None]:
        def plant(folder: Path) -> None:
            (folder / "evil.py").write_text(source)
            (folder / "__init__.py").write_text(source)
            for name, changed in changes:
                change(folder / name, **changed)

        return plant

    own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    unknown = {"auto_map": own, "model_type": "evil"}
    yield Artefact("auto_map of a known type", "model", with_module(("config.json", {"auto_map": own})), refused=False)
    yield Artefact("auto_map of an unknown type", "model", with_module(("config.json", unknown)))
    trusting = {**unknown, "trust_remote_code": True}
    yield Artefact("trust_remote_code in config.json", "model", with_module(("config.json", trusting)))
    elsewhere = {"model_type": "evil", "auto_map": {"AutoConfig": "evil/elsewhere--evil.Evil"}}
    yield Artefact("auto_map of another repository", "model", with_module(("config.json", elsewhere)))
    for tokens in ({"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, ["evil.Evil", "evil.Evil"]):
        changed = {"auto_map": tokens, "trust_remote_code": True}
        planted = with_module(("tokenizer_config.json", changed))
        yield Artefact("auto_map of a tokenizer", "model", planted, refused=False)
        changed = {**changed, "tokenizer_class": "Evil"}
        planted = with_module(("tokenizer_config.json", changed))
        yield Artefact("auto_map of an unknown tokenizer", "model", planted, refused=False)

    def generates(folder: Path) -> None:
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(source)

    yield Artefact("custom_generate", "model", generates, refused=False)
    for name, changed in (
        ("architectures", {"architectures": ["os.system", "Evil"]}),
        ("a kernel of the Hub", {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}),
        ("quantisation by a pickle", {"quantization_config": {"quant_method": "pickle", "modules": "os.system"}}),
        ("dtype", {"dtype": "__import__('os').system('" + traps.command + "')"}),
    ):
        planted = with_module(("config.json", changed))
        yield Artefact(f"config.json: {name}", "model", planted, refused=False)
    trusting = {"trust_remote_code": True, "auto_map": {"base_model_class": "Evil", "parent_library": "evil"}}
    yield Artefact("auto_mapping of an adapter", "run", with_module(("adapter_config.json", trusting)), refused=False)
    yield Artefact(
        "an object in recipe.yaml",
        "run",
        lambda folder: (folder / "recipe.yaml").write_text(
            f"model: !!python/object/apply:os.system ['{traps.command}']\n"
        ),
    )
    yield Artefact(
        "trust_remote_code in recipe.yaml",
        "run",
        lambda folder: change_yaml(folder / "recipe.yaml", "trust_remote_code: true\ntokenizer_kwargs:"),
        refused=True,
    )


def jinja(traps: Traps) -> Iterator[Artefact]:
    run = f"'{traps.command}'"
    secret = traps.folder / "config.json"
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        f"{{{{ cycler.__init__.__globals__.os.popen({run}).read() }}}}",
        f"{{{{ lipsum.__globals__['os'].system({run}) }}}}",
        f"{{{{ self.__init__.__globals__.__builtins__.__import__('os').system({run}) }}}}",
        f"{{{{ namespace.__init__.__globals__.os.system({run}) }}}}",
        f"{{{{ (''|attr('__class__')|attr('__base__')|attr('__subclasses__')())[140]({run}) }}}}",
        f"{{{{ raise_exception.__globals__.__builtins__.exec({run}) }}}}",
        f"{{{{ strftime_now.__globals__['datetime'].sys.modules.os.system({run}) }}}}",
        f"{{{{ messages.__class__.__base__.__subclasses__()[100].__init__.__globals__.system({run}) }}}}",
        "{{ '{0.__class__.__base__.__subclasses__}'.format(1) }}",
        "{{ '{x.__init__.__globals__}'.format_map({'x': cycler}) }}",
        f"{{% include '{secret}' %}}",
        f"{{% import '{secret}' as secret %}}",
        f"{{% extends '{secret}' %}}",
        f"{{% set f = joiner.__call__.__func__.__globals__ %}}{{{{ f.os.system({run}) }}}}",
        f"{{{{ tojson.__globals__.json.decoder.scanner.__builtins__.exec({run}) }}}}",
        "{% set _ = messages.append({}) %}{% set _ = messages.clear() %}",
    ):
        yield Artefact(f"an escape {source[:60]}", "model", template(source), refused=False)
    for source in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ ('a' * 10 ** 8) | list | length }}{{ ('a' * 9 * 10 ** 8) }}",
        "{{ 10 ** (9 ** 9) }}",
        "{{ 'a' | center(10 ** 11) }}",
        "{{ range(99999) | join('a' * 99999) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:>99999999999}'.format('a') }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    ):
        yield Artefact(f"a bomb {source[:60]}", "model", template(source))

    def in_config(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        change(folder / "tokenizer_config.json", chat_template=loops)

    yield Artefact("a loop in tokenizer_config.json", "model", in_config)


def paths(traps: Traps) -> Iterator[Artefact]:
    outside = traps.folder

    def shards(name: str) -> Callable[[Path], None]:
        def plant(folder: Path) -> None:
            from safetensors import safe_open

            with safe_open(folder / WEIGHTS, "pt") as file:
                names = list(file.keys())
            (folder / WEIGHTS).unlink()
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
            (folder / INDEX).write_text(json.dumps(index))

        return plant

    for name in (
        "../../outside/model.safetensors",
        str(outside / "model.safetensors"),
        "sub/../../../outside/model.safetensors",
        "..\\..\\outside\\model.safetensors",
        "C:\\model.safetensors",
        "model.safetensors\0",
        "..",
    ):
        yield Artefact(f"a shard {name!r}", "model", shards(name))

    def link(name: str, target: Path) -> Callable[[Path], None]:
        def plant(folder: Path) -> None:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.symlink_to(target)

        return plant

    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"):
        yield Artefact(f"a link {name}", "model", link(name, outside / name))
    relative = Path("../../outside/model.safetensors")
    yield Artefact("a relative link", "model", link(WEIGHTS, relative))
    yield Artefact("a link chat_template.jinja", "model", link("chat_template.jinja", outside / "templates/tool.jinja"))
    yield Artefact("a link to templates", "model", link("additional_chat_templates", traps.templates))
    yield Artefact("a link to nothing", "model", link(WEIGHTS, Path("/nothing/there")))
    yield Artefact("a link to itself", "model", link(WEIGHTS, Path(WEIGHTS)))
    yield Artefact("a device", "model", link("config.json", Path("/dev/zero")))

    def pipe(name: str) -> Callable[[Path], None]:
        def plant(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)

        return plant

    yield Artefact("a pipe config.json", "model", pipe("config.json"))
    yield Artefact("a pipe model.safetensors", "model", pipe(WEIGHTS))
    for key in ("vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file", "chat_template_file"):
        yield Artefact(
            f"tokenizer_config.json: {key}",
            "model",
            lambda folder, key=key: change(folder / "tokenizer_config.json", **{key: str(outside / "tokenizer.json")}),
            refused=False,
        )
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_format.json"):
        yield Artefact(f"a link {name}", "run", link(name, outside / "config.json"))

    def names_outside(name: str) -> Callable[[Path], None]:
        def plant(checkpoint: Path) -> None:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            manifest["sha256"][name] = hashlib.sha256((outside / "config.json").read_bytes()).hexdigest()
            traps.sprung()
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))

        return plant

    for name in ("../../../outside/config.json", str(outside / "config.json")):
        yield Artefact(f"a manifest that names {name!r}", "checkpoint", names_outside(name))
    for name in ("parameters.safetensors", "state.json", "manifest.json"):
        yield Artefact(f"a link {name}", "checkpoint", link(name, outside / "config.json"))


def bombs(traps: Traps) -> Iterator[Artefact]:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", INDEX):
        yield Artefact(f"{name} of depth 100,000", "model", lambda f, name=name: (f / name).write_text(DEEP))
        yield Artefact(
            f"{name} of 10 GB", "model", lambda f, name=name: os.truncate((f / name).touch() or f / name, 10**10)
        )
    for key, size in (
        ("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", 10**9), ("intermediate_size", 10**12),
        ("num_attention_heads", 10**9), ("vocab_size", 9_000_000), ("intermediate_size", 9_000_000),
        ("num_hidden_layers", 900), ("num_hidden_layers", -1), ("vocab_size", "many"),
    ):  # fmt: skip
        planted = lambda f, key=key, size=size: change(f / "config.json", **{key: size})  # noqa: E731
        yield Artefact(f"config.json: {key} {size}", "model", planted)

    def weights(content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / WEIGHTS).write_bytes(content)

    header = json.dumps({"x": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}).encode()
    overlapping = {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}
    yield Artefact("a header of 2^63 bytes", "model", weights(struct.pack("<Q", 1 << 63)))
    yield Artefact("a header of 99 MB", "model", weights(struct.pack("<Q", 99 << 20) + b"{"))
    yield Artefact("a tensor of 10^15 numbers", "model", weights(struct.pack("<Q", len(header)) + header))
    header = json.dumps(overlapping).encode()
    yield Artefact("tensors on one another", "model", weights(struct.pack("<Q", len(header)) + header + bytes(8)))
    header = b'{"a":' + DEEP.encode() + b"}"
    yield Artefact("a header of depth 100,000", "model", weights(struct.pack("<Q", len(header)) + header))

    def gguf(*parts: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "model.gguf").write_bytes(b"".join(parts))

    start, key = b"GGUF" + struct.pack("<I", 3), struct.pack("<Q", 4) + b"arch"
    huge, few = 1 << 60, struct.pack("<QQ", 0, 1)
    yield Artefact("that is none", "gguf", gguf(b"PK\x03\x04" + bytes(100)))
    yield Artefact("a pickle", "gguf", gguf(pickle.dumps(Payload(traps.command))))
    yield Artefact("2^60 settings", "gguf", gguf(start, struct.pack("<QQ", 0, huge), bytes(64)))
    yield Artefact("2^60 tensors", "gguf", gguf(start, struct.pack("<QQ", huge, 0), bytes(64)))
    yield Artefact("a text of 2^60 bytes", "gguf", gguf(start, few, key, struct.pack("<IQ", 8, huge), b"x"))
    yield Artefact("a list of 2^60", "gguf", gguf(start, few, key, struct.pack("<IIQ", 9, 0, huge), b"x"))
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(100_000))
    yield Artefact("lists of lists", "gguf", gguf(start, few, key, struct.pack("<I", 9), nested))

    for name in ("adapter_config.json", "chat_format.json"):
        yield Artefact(f"{name} of depth 100,000", "run", lambda f, name=name: (f / name).write_text(DEEP))
    slow = {r"((a|b|ab|[a-z._0-9]*)*X)": 4}
    for key in ("rank_pattern", "alpha_pattern"):
        yield Artefact(
            f"a slow {key}", "run", lambda f, key=key: change(f / "adapter_config.json", **{key: slow}),
            refused=key == "alpha_pattern",
        )  # fmt: skip
    for key, value in (("alpha_pattern", {"(": 1}), ("lora_alpha", "many"), ("lora_dropout", "x"),
                       ("modules_to_save", 5), ("lora_alpha", [1]), ("alpha_pattern", 7)):  # fmt: skip
        planted = lambda f, key=key, value=value: change(f / "adapter_config.json", **{key: value})  # noqa: E731
        yield Artefact(f"adapter_config.json: {key} {value}", "run", planted)
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    yield Artefact("a billion laughs", "run", lambda f: (f / "recipe.yaml").write_text(laughs))
    yield Artefact("recipe.yaml of depth 100,000", "run", lambda f: (f / "recipe.yaml").write_text(DEEP))
    for name in ("state.json", "manifest.json"):
        plant = lambda f, name=name: (f / name).write_text(DEEP)  # noqa: E731
        planted = plant if name == "manifest.json" else proven(plant)
        yield Artefact(f"{name} of depth 100,000", "checkpoint", planted)
    for name, content in (("counters", {"evil": 1}), ("step", "many"), ("identity", 5), ("best", []), ("usage", [1])):
        plant = lambda f, name=name, content=content: change(f / "state.json", **{name: content})  # noqa: E731
        yield Artefact(f"state.json: {name} {content}", "checkpoint", proven(plant))

    import bz2
    import lzma

    rows = b"{}\n" * (30 << 20)
    for name, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        planted = lambda f, name=name, compress=compress: (f / f"chats.jsonl.{name}").write_bytes(compress(rows))  # noqa: E731
        yield Artefact(f"90 MB in a few kB of {name}", "data", planted)
    yield Artefact("a JSON array of depth 100,000", "data", lambda f: (f / "chats.json").write_text(DEEP))


def template(source: str) -> Callable[[Path], None]:
    """A model's chat template with something in front."""

    def plant(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(source + path.read_text())

    return plant


def proven(plant: Callable[[Path], object]) -> Callable[[Path], None]:
    """In a checkpoint, with a manifest that speaks for what was planted."""

    def planted(checkpoint: Path) -> None:
        plant(checkpoint)
        files = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        (checkpoint / "manifest.json").write_text(json.dumps({"sha256": digests}))

    return planted


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_yaml(path: Path, text: str) -> None:
    path.write_text(path.read_text().replace("tokenizer_kwargs:", text))
