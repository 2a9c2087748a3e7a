"""From a YAML file, `key=value` overrides or Python dictionaries to a checked `Recipe`."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from phinetune.errors import RecipeError
from phinetune.recipe.names import QUANTISING, SECTIONS, current_name, known_names, nearest, settle, unfold
from phinetune.recipe.schema import ModelKwargs, Recipe

LENGTHS = ("max_length", "max_seq_length")  # of rows, in SFTConfig objects
NO_LIMIT = 1 << 20  # tokens, more than any row has
FILLED_IN = ("greater_is_better",)  # by transformers, after what the metric is called
FREE_SECTIONS = ("tokenizer_kwargs",)  # passed on as they are
LARGEST = 1 << 20  # bytes of a recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Reads a recipe file and applies `key=value` overrides.

    A key is `section.name`, or `name` alone where one section has it.

    Returns:
        The recipe, and the words to say about names that were mapped or ignored.

    Raises:
        RecipeError: for a missing or malformed file, an unknown name, or a value out of range.
    """
    given, origins = read_recipe(path), {}
    for override in overrides:
        old, new = apply_override(given, override)
        origins[new] = _origin("command line", new, old)
    return make_recipe(given, where=str(path), origins=origins)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file as it stands, a mapping of sections; not checked yet."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise RecipeError(str(path), f"has more than {LARGEST:,} bytes", "give a recipe")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(str(path), "no such recipe", "write one with `phinetune init chats.jsonl`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), f"can't be read ({error})", "give a YAML file in UTF-8") from None
    try:
        given = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(
            str(path), f"is not valid YAML ({' '.join(str(error).split())})", "correct that line"
        ) from None
    except RecursionError:
        raise RecipeError(str(path), "is nested too deeply", "a recipe has sections of settings") from None
    if not isinstance(given, dict):
        raise RecipeError(str(path), "is not a mapping of settings", "begin with `model: smollm2`")
    return given


def make_recipe(
    given: Mapping[str, Any], where: str = "recipe", by: str = "recipe", origins: Mapping[str, str] | None = None
) -> tuple[Recipe, list[str]]:
    """The same from a dictionary; `training_config` and `peft_config` may be real config objects.

    Args:
        where: said in errors.
        by: what the settings come from, where `origins` doesn't say otherwise.
    """
    unknown = [str(key) for key in given if key not in Recipe.model_fields]
    if unknown:
        hints = [f"unknown section {key}{_hint_for_section(key)}" for key in unknown]
        raise RecipeError(where, " and ".join(hints), f"a recipe has {', '.join(Recipe.model_fields)}")
    tree: dict[str, Any] = {"model": given["model"]} if "model" in given else {}
    words: list[str] = []
    origins = {**{key: by for key in ("model", *FREE_SECTIONS) if key in given}, **(origins or {})}
    for section in (*SECTIONS, *FREE_SECTIONS):
        values = unfold(section, _as_dict(section, given.get(section), where))
        if section in FREE_SECTIONS:
            tree[section] = values
            continue
        if section in given:
            tree.setdefault(section, {})
        for name, value in values.items():
            path = current_name(section, name, value)[0]
            origins.setdefault(path, _origin(by, path, f"{section}.{name}"))
        settled, said = settle(section, values, where)
        words += said
        for path, value in settled.items():
            owner, name = path.split(".")
            if tree.setdefault(owner, {}).setdefault(name, value) != value:
                if path == "data.max_length" and dataclasses.is_dataclass(given[section]):
                    continue  # an SFTConfig always has one: what `data` says is what was asked for
                what = f"{path} is given twice, as {tree[owner][name]!r} and as {value!r} in {section}"
                raise RecipeError(where, what, "keep one")
    for what in ("save", "eval"):
        config = tree.get("training_config", {})
        if config.get(f"{what}_steps") is not None and f"{what}_strategy" not in config:
            config[f"{what}_strategy"] = "steps"
            origins[f"training_config.{what}_strategy"] = f"derived from {what}_steps"
            words.append(f"training_config.{what}_strategy is steps, since {what}_steps is given")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(where, " and ".join(_say(fault) for fault in error.errors()), "correct it") from None
    recipe.origins = origins
    return recipe, words


def make_section(name: str, given: Mapping[str, Any], where: str) -> Any:
    """One section of a recipe by itself, checked as the whole would be; what is said of its names is dropped."""
    recipe, _ = make_recipe({"model": "", "data": {"train": ""}, name: given}, where=where)
    return getattr(recipe, name)


def make_model_kwargs(given: Mapping[str, Any], over: ModelKwargs) -> ModelKwargs:
    """`over` with other settings, under current or older names.

    Raises:
        RecipeError: as `make_recipe`.
    """
    own = over.model_dump(exclude_unset=True)
    if "quantization_config" in given:
        own = {name: value for name, value in own.items() if not name.startswith(QUANTISING)}
    for name, value in given.items():
        own.pop(current_name("model_kwargs", name, value)[0].rpartition(".")[2], None)
    section: ModelKwargs = make_section("model_kwargs", {**own, **given}, "model_kwargs")
    return section


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every setting with its value; tokens are left out."""
    tree = recipe.model_dump(exclude={"model_kwargs": {"token"}})
    return yaml.dump(tree, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


def apply_override(given: dict[str, Any], override: str) -> tuple[str, str]:
    """Writes a `key=value` into a recipe that was read; gives its path as it was called, and as it is called now."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r}", "has no `=`", "write key=value, such as learning_rate=1e-4")
    value = yaml_value(text)
    if key in ("model", *FREE_SECTIONS):
        given[key] = value
        return key, key
    section, _, name = key.rpartition(".")
    if not section:
        owners = [s for s, model in SECTIONS.items() if name in model.model_fields]
        owners = owners or [s for s in SECTIONS if name in known_names(s)]
        if len(owners) != 1:
            everything = [n for s in SECTIONS for n in known_names(s)]
            what = f"is in {' and '.join(owners)}" if owners else f"unknown name{nearest(name, everything)}"
            raise RecipeError(f"override {override!r}", what, "write section.name=value")
        section = owners[0]
    if section not in (*SECTIONS, *FREE_SECTIONS):
        hint = nearest(section, (*SECTIONS, *FREE_SECTIONS))
        raise RecipeError(f"override {override!r}", f"unknown section {section}{hint}", "write section.name=value")
    called = path = f"{section}.{name}"
    if section in SECTIONS:
        path, value = current_name(section, name, value)
        section, name = path.split(".")
        _forget(given, path)
    if given.get(section) is None:
        given[section] = {}
    if not isinstance(given[section], dict):
        raise RecipeError(section, "is not a mapping", "write name: value lines below it")
    given[section][name] = value
    return called, path


def yaml_value(text: str) -> Any:
    """What stands behind a `key=`; text that isn't YAML is itself."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        return text


def _forget(given: dict[str, Any], path: str) -> None:
    """Takes a setting out of a recipe under every name it may have there: an override is stronger."""
    for section in SECTIONS:
        values = given.get(section)
        if not isinstance(values, dict):
            continue
        for name in list(values):
            is_spoken_for = path == "model_kwargs.quantization_config" and str(name).startswith(QUANTISING)
            if is_spoken_for or current_name(section, str(name), values[name])[0] == path:
                del values[name]


def _origin(by: str, new: str, old: str) -> str:
    """An old name is said, with its section where that has changed too."""
    if old == new:
        return by
    same = old.rpartition(".")[0] == new.rpartition(".")[0]
    return f"{by}, as {old.rpartition('.')[2] if same else old}"


def _as_dict(section: str, value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping):  # sets, as `LoraConfig.to_dict` has them, have an order of their own in each process
        return {str(key): sorted(item) if isinstance(item, set) else item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        _check_kind(section, value, where)
        return _from_config_object(section, value)
    raise RecipeError(f"{where}: {section}", f"is {value!r}, not a mapping", "write name: value lines below it")


def _check_kind(section: str, config: Any, where: str) -> None:
    """Raises RecipeError for a library's object for another trainer or method: most of what it asks for has no name
    here."""
    names = {base.__name__ for base in type(config).__mro__}
    libraries = {base.__module__.partition(".")[0] for base in type(config).__mro__}
    known = {"training_config": ("TrainingArguments", "SFTConfig"), "peft_config": ("LoraConfig",)}.get(section, ())
    is_foreign = not libraries.isdisjoint(("peft", "transformers", "trl")) and names.isdisjoint(known)
    if is_foreign or ("trl" in libraries and "SFTConfig" not in names):
        what = f"is a {type(config).__name__}, which asks for another training"
        raise RecipeError(f"{where}: {section}", what, f"give a {' or '.join(known)}")


def _from_config_object(section: str, config: Any) -> dict[str, Any]:
    """What a TrainingArguments, SFTConfig or LoraConfig object asks for.

    Fields that we have are taken as they are, and the length of rows; of the others only what differs from a plain
    object of that class, so that it doesn't raise a hundred warnings.
    """
    ours = SECTIONS[section].model_fields
    values: dict[str, Any] = {}
    plain = _plain(config)
    for field in dataclasses.fields(config):
        if not field.init or field.name.startswith("_") or field.name in FILLED_IN:
            continue
        value = getattr(config, field.name, None)
        value = getattr(value, "value", value)  # enums
        value = sorted(value) if isinstance(value, set) else value
        if field.name in LENGTHS and value is None and getattr(plain, field.name, None) is not None:
            values[field.name] = NO_LIMIT
        elif field.name in ours:
            if value is not None or type(None) in get_args(ours[field.name].annotation):
                values[field.name] = value
        elif (field.name in LENGTHS or value != getattr(plain, field.name, None)) and value not in (None, "", [], {}):
            values[field.name] = value
    return values


def _plain(config: Any) -> Any:
    """An object of the same class that was given nothing; where a machine refuses that (SFTConfig's bf16), one for a
    processor in float32, or the defaults as they are written."""
    for given in ({}, {"use_cpu": True, "bf16": False}):
        try:
            return type(config)(**given)
        except (TypeError, ValueError):
            continue
    made = {f.name: f.default_factory() if callable(f.default_factory) else f.default
            for f in dataclasses.fields(config)}  # fmt: skip
    return types.SimpleNamespace(**made)


def _hint_for_section(key: str) -> str:
    for section in SECTIONS:
        if key in SECTIONS[section].model_fields:
            return f" ({key} belongs in {section})"
    return nearest(key, Recipe.model_fields)


def _say(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{path} is missing"
    given = "" if isinstance(fault["input"], Mapping) else f"={fault['input']!r}"  # a whole section may hold a token
    return f"{path}{given}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


class _PlainDumper(yaml.SafeDumper):
    """Writes everything out, since aliases aren't read back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML would settle in silence, and aliases, by which a few lines can grow
    to any size. A date is the text that it is."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own table
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"*{event.anchor} in line {event.start_mark.line + 1} is an alias: write it out")
        return super().compose_node(parent, index)  # type: ignore[no-any-return]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = own[index].start_mark
                raise yaml.YAMLError(f"{key!r} stands twice, again in line {mark.line + 1}")
        return super().construct_mapping(node, deep)
