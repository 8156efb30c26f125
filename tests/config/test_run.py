from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restomod.config.model import nearest_divisor_below
from restomod.config.prepare import PrepareConfig
from restomod.config.presets import PRESETS, preset
from restomod.config.run import (
    SOURCES_WITH_PATH,
    Compile,
    DataConfig,
    Device,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    SamplingConfig,
    Source,
)
from restomod.config.serialize import from_dict, to_dict
from restomod.utils.errors import UserError

MINIMAL = {"steps": 1, "batch_tokens": 64, "sequence_length": 64}


def run_config(**values: Any) -> RunConfig:
    return RunConfig(**{**MINIMAL, **values})


# --- JSON ---------------------------------------------------------------------------------------------------


def through_json(config: RunConfig) -> RunConfig:
    return from_dict(json.loads(json.dumps(to_dict(config))))


counts = st.integers(1, 10**6)
fractions = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, 1e300, exclude_min=True)


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    T = draw(st.integers(1, 2048))
    B = draw(st.integers(1, 64))
    n_head = draw(st.integers(1, 16))
    source = draw(st.sampled_from(get_args(Source)))
    return RunConfig(
        steps=draw(counts),
        batch_tokens=T * B * draw(st.integers(1, 64)),
        sequence_length=T,
        model=ModelConfig(
            n_layer=draw(st.integers(1, 4096)),
            n_head=n_head,
            n_embd=n_head * draw(st.integers(1, 99)),
            n_positions=T + draw(st.integers(0, 99)),
            vocab_size=draw(counts),
        ),
        data=DataConfig(
            source=source,
            path=None if source not in SOURCES_WITH_PATH else draw(st.none() | st.text()),
            glob=draw(st.text()),
            val_fraction=draw(fractions),
            split_seed=draw(st.integers(0, 2**31)),
            cache=draw(st.text()),
        ),
        optim=OptimConfig(
            lr=draw(positive),
            min_lr_ratio=draw(st.floats(0, 1)),
            warmup_steps=draw(st.integers(0, 10**6)),
            betas=draw(st.tuples(fractions, fractions)),
            eps=draw(positive),
            weight_decay=draw(st.floats(0, 1e300)),
            grad_clip=draw(positive),
        ),
        sampling=SamplingConfig(
            prompts=tuple(draw(st.lists(st.text()))),
            max_tokens=draw(counts),
            temperature=draw(st.floats(0, 1e300)),
            top_k=draw(st.integers(0, 99)),
            top_p=draw(st.floats(0, 1, exclude_min=True)),
        ),
        micro_batch=draw(st.none() | st.just(B)),
        target_loss=draw(st.none() | st.floats(-1e300, 1e300)),
        eval_every=draw(counts),
        eval_tokens=draw(st.none() | st.integers(T, 10**9)),
        sample_every=draw(counts),
        save_every=draw(counts),
        keep_checkpoints=draw(st.integers(0, 99)),
        seed=draw(st.integers(0, 2**31)),
        device=draw(st.sampled_from(get_args(Device))),
        precision=draw(st.sampled_from(get_args(Precision))),
        compile=draw(st.sampled_from(get_args(Compile))),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    assert through_json(preset(name)) == preset(name)


@given(run_configs())
def test_every_config_survives_json(config: RunConfig) -> None:
    assert through_json(config) == config


def test_json_holds_every_field_by_name() -> None:
    values = to_dict(run_config())
    assert list(values) == [f.name for f in dataclasses.fields(RunConfig)]
    assert values["optim"]["betas"] == [0.9, 0.95]
    assert values["data"]["source"] == "python-stdlib"


def test_absent_fields_take_their_defaults() -> None:
    assert from_dict({**MINIMAL, "optim": {"lr": 0.5}}) == run_config(optim=OptimConfig(lr=0.5))


def test_an_integer_is_accepted_as_a_float() -> None:
    lr = from_dict({**MINIMAL, "optim": {"lr": 1}}).optim.lr
    assert (lr, type(lr)) == (1.0, float)


def message(values: Any) -> str:
    """What `from_dict` says against ``values``, which it must refuse by the file's name."""
    with pytest.raises(UserError) as caught:
        from_dict(values, where="runs/mine/config.json")
    assert str(caught.value).startswith("runs/mine/config.json: ")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("runs/mine/config.json: ")


def nested(key: str, value: Any) -> dict[str, Any]:
    """A minimal file, but for ``value`` under the dotted ``key``."""
    *above, name = key.split(".")
    return {**MINIMAL, **({above[0]: {name: value}} if above else {name: value})}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("stepss", "unknown key stepss; did you mean 'steps'?"),
        ("optim.lrr", "unknown key optim.lrr; did you mean 'lr'?"),
        ("model.n_heads", "unknown key model.n_heads; did you mean 'n_head'?"),
        ("sampling.xyzzy", "unknown key sampling.xyzzy; known: max_tokens, prompts, temperature, top_k, top_p"),
    ],
)
def test_an_unknown_key_is_rejected_with_a_suggestion(key: str, said: str) -> None:
    assert message(nested(key, 1)) == said


def test_all_missing_keys_are_named() -> None:
    assert message({"steps": 1}) == "missing batch_tokens, sequence_length"


@dataclass(frozen=True)
class Inner:
    needed: int


@dataclass(frozen=True)
class Outer:
    inner: Inner


def test_a_missing_nested_key_is_named_with_its_dots() -> None:
    with pytest.raises(UserError, match=r"a\.json: missing inner\.needed"):
        from_dict({"inner": {}}, Outer, "a.json")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", "3", "steps should be int, not '3'"),
        ("steps", 3.0, "steps should be int, not 3.0"),
        ("steps", True, "steps should be int, not True"),
        ("steps", None, "steps should be int, not None"),
        ("target_loss", "low", "target_loss should be float, not 'low'"),
        ("micro_batch", 1.5, "micro_batch should be int, not 1.5"),
        ("compile", True, "compile is True; known: auto, off, on"),
        ("gradient_checkpointing", 1, "gradient_checkpointing should be bool, not 1"),
        ("device", "cdua", "device is 'cdua'; did you mean 'cuda'?"),
        ("device", ["cpu"], "device is ['cpu']"),
        ("model", 12, "model should be an object, not 12"),
        ("model.n_layer", None, "model.n_layer should be int, not None"),
        ("data.source", "txt", "data.source is 'txt'; did you mean 'text'?"),
        ("data.path", 3, "data.path should be str, not 3"),
        ("optim.lr", "x", "optim.lr should be float, not 'x'"),
        ("optim.lr", True, "optim.lr should be float, not True"),
        ("optim.betas", 0.9, "optim.betas should be a list, not 0.9"),
        ("optim.betas", [0.9], "optim.betas should have 2 values, not 1"),
        ("optim.betas", [0.9, 0.9, 0.9], "optim.betas should have 2 values, not 3"),
        ("optim.betas", [0.9, "x"], "optim.betas should be float, not 'x'"),
        ("sampling.prompts", "hello", "sampling.prompts should be a list, not 'hello'"),
        ("sampling.prompts", ["hello", 1], "sampling.prompts should be str, not 1"),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected_with_its_dotted_key(key: str, value: Any, said: str) -> None:
    assert message(nested(key, value)).startswith(said)


@pytest.mark.parametrize("value", [None, [], 3, "text"])
def test_a_file_without_an_object_is_rejected(value: Any) -> None:
    assert message(value) == f"the file should be an object, not {value!r}"


def test_a_value_out_of_range_in_a_file_is_rejected() -> None:
    assert message(nested("steps", 0)).startswith("steps is 0")
    assert message(nested("optim.lr", -1.0)).startswith("optim.lr is -1.0")


# --- ranges -------------------------------------------------------------------------------------------------

SECTIONS = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "sampling": SamplingConfig}
NAN = float("nan")


def build(key: str, value: Any) -> Any:
    section, _, name = key.rpartition(".")
    return SECTIONS[section](**{name: value}) if section else run_config(**{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("steps", "batch_tokens", "sequence_length") for value in (0, -64)),
        *((key, value) for key in ("eval_every", "sample_every", "save_every", "micro_batch") for value in (0, -1)),
        ("keep_checkpoints", -1),
        ("eval_tokens", 63),
        *(("model.rope_theta", value) for value in (0.0, -1.0, NAN)),
        *(("data.val_fraction", value) for value in (-0.1, 1.0, 1.5, NAN)),
        *(("optim.lr", value) for value in (0.0, -1.0, NAN)),
        *(("optim.muon_lr", value) for value in (0.0, -1.0, NAN)),
        *(("optim.muon_momentum", value) for value in (-0.1, 1.0, NAN)),
        *(("optim.cooldown", value) for value in (0.0, 1.1, NAN)),
        *(("optim.min_lr_ratio", value) for value in (-0.1, 1.1, NAN)),
        ("optim.warmup_steps", -1),
        *(("optim.betas", value) for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (NAN, 0.9))),
        *(("optim.eps", value) for value in (0.0, -1.0, NAN)),
        *((f"optim.{name}", value) for name in ("weight_decay", "muon_weight_decay") for value in (-0.1, NAN)),
        *(("optim.grad_clip", value) for value in (0.0, -1.0, NAN)),
        *(("sampling.max_tokens", value) for value in (0, -1)),
        *(("sampling.temperature", value) for value in (-0.1, NAN)),
        ("sampling.top_k", -1),
    ],
)
def test_a_value_out_of_range_is_rejected_with_its_dotted_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(key)} .*{re.escape(str(value))}"):
        build(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep_checkpoints", 0),
        ("eval_tokens", 64),
        ("micro_batch", 1),
        *((f"model.{name}", 1) for name in ("n_layer", "n_head", "n_positions", "vocab_size")),
        ("data.val_fraction", 0.0),
        ("optim.min_lr_ratio", 0.0),
        ("optim.min_lr_ratio", 1.0),
        ("optim.warmup_steps", 0),
        ("optim.betas", (0.0, 0.0)),
        ("optim.weight_decay", 0.0),
        ("sampling.max_tokens", 1),
        ("sampling.temperature", 0.0),
        ("sampling.top_k", 0),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(key: str, value: Any) -> None:
    build(key, value)


def test_a_sequence_longer_than_the_context_is_rejected() -> None:
    with pytest.raises(UserError, match=r"sequence_length 64 is longer than model\.n_positions 63"):
        run_config(model=ModelConfig(n_positions=63))
    run_config(model=ModelConfig(n_positions=64))


def test_a_path_with_the_standard_library_is_rejected() -> None:
    with pytest.raises(UserError, match=r"add --data\.source text"):
        DataConfig(path="book.txt")


# --- suggestions ----------------------------------------------------------------------------------------------


def numbers_after(text: str, error: UserError) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", str(error).split(text)[1])]


@given(st.integers(1, 10**7), st.integers(2, 1024))
def test_proposed_batch_tokens_are_accepted_and_are_the_nearest(batch_tokens: int, T: int) -> None:
    batch_tokens += batch_tokens % T == 0
    with pytest.raises(UserError, match="is not a multiple of sequence_length") as caught:
        run_config(batch_tokens=batch_tokens, sequence_length=T)
    proposed = numbers_after("nearest that are: ", caught.value)
    for value in proposed:
        run_config(batch_tokens=value, sequence_length=T)
    assert proposed == [n for n in range(max(1, batch_tokens - T + 1), batch_tokens + T) if n % T == 0]


def nearest_divisors(n: int, to: int) -> list[int]:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [d for d in divisors if abs(d - to) == min(abs(other - to) for other in divisors)]


@given(st.integers(1, 300), st.integers(2, 400))
def test_a_proposed_micro_batch_is_accepted_and_is_the_nearest(sequences: int, B: int) -> None:
    B += sequences % B == 0
    if sequences % B == 0:
        return
    with pytest.raises(UserError, match=r"micro_batch \d+ does not divide") as caught:
        run_config(batch_tokens=64 * sequences, micro_batch=B)
    (proposed,) = numbers_after("the nearest that does is ", caught.value)
    assert run_config(batch_tokens=64 * sequences, micro_batch=proposed).micro_batch == proposed
    assert proposed in nearest_divisors(sequences, B)


@given(st.integers(1, 300), st.integers(2, 400))
def test_a_proposed_number_of_heads_is_accepted_and_is_the_nearest(n_embd: int, n_head: int) -> None:
    n_head += n_embd % n_head == 0
    if n_embd % n_head == 0:
        return
    with pytest.raises(UserError, match=r"is not a multiple of model\.n_head") as caught:
        ModelConfig(n_embd=n_embd, n_head=n_head)
    (proposed,) = numbers_after("try model.n_head ", caught.value)
    assert ModelConfig(n_embd=n_embd, n_head=proposed).n_head == proposed
    assert proposed in nearest_divisors(n_embd, n_head)


# --- derived values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(50257, 50304), (1, 64), (63, 64), (64, 64), (65, 128), (50304, 50304)]
)
def test_the_vocabulary_is_padded_to_a_multiple_of_64(vocab_size: int, padded: int) -> None:
    assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_sequences_of_a_step() -> None:
    assert run_config(batch_tokens=640).batch_sequences == 10


@given(st.integers(1, 500), st.integers(-2, 600))
def test_nearest_divisor_below(n: int, limit: int) -> None:
    assert nearest_divisor_below(n, limit) == max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, limit))


def test_a_config_is_frozen_and_replace_checks_the_values() -> None:
    config = run_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 2  # type: ignore[misc]
    with pytest.raises(UserError, match="steps is 0"):
        replace(config, steps=0)


# --- preparation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"val_fraction": 0.0}, {"val_fraction": 0.999}, {"shard_tokens": 1}])
def test_prepare_settings_at_their_limits_are_accepted(values: dict[str, Any]) -> None:
    assert dataclasses.asdict(PrepareConfig(**values)) == dataclasses.asdict(PrepareConfig()) | values


@pytest.mark.parametrize(
    "values",
    [
        *({"val_fraction": value} for value in (-0.1, 1.0, float("nan"), float("inf"))),
        *({"shard_tokens": value} for value in (0, -1)),
        *({"split_seed": value} for value in (-1, 2**32)),
    ],
)
def test_prepare_settings_out_of_range_are_rejected_with_their_flag(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is "):
        PrepareConfig(**values)


# --- mixes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("web:0.7,books:0.3", [("web", Fraction(7, 10)), ("books", Fraction(3, 10))]),
        ("web:2, a/b c:1,x:1", [("web", Fraction(1, 2)), ("a/b c", Fraction(1, 4)), ("x", Fraction(1, 4))]),
        ("C:/data:1", [("C:/data", Fraction(1))]),
        ("a:1,b:2", [("a", Fraction(333333, 1000000)), ("b", Fraction(666667, 1000000))]),
    ],
)
def test_a_mix_has_folders_and_shares(mix: str, expected: list[tuple[str, Fraction]]) -> None:
    assert DataConfig(source="tokens", mix=mix).mixed() == expected
    assert sum(share for _, share in expected) == 1


@pytest.mark.parametrize("mix", ["", "web", "web:", ":0.5", "web:0.5,", "web:-1", "web:0", "web:nan", "web:inf", "a:x"])
def test_an_invalid_mix_is_rejected(mix: str) -> None:
    with pytest.raises(UserError, match="is not FOLDER:WEIGHT"):
        DataConfig(source="tokens", mix=mix)


@pytest.mark.parametrize(
    ("mix", "said"), [("a:1,a:2", "names a folder twice"), ("a:1,b:1e-9", "less than a millionth")]
)
def test_a_mix_with_invalid_folders_or_weights_is_rejected(mix: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        DataConfig(source="tokens", mix=mix)


def test_a_mix_excludes_a_path() -> None:
    with pytest.raises(UserError, match=r"omit data\.path"):
        DataConfig(source="tokens", path="x", mix="a:1,b:1")


@pytest.mark.parametrize(
    "names",
    [
        ["a,b", "c"],
        ["web, v2", "x,y,z"],
        ["a:b", "c:1"],
        ["a:1,b", "c"],
        ["a:0.5,b:0.5,c", "d:1e-3,e"],
        ["1,2", ",", "3:4,5:6"],
        [" a", "b "],
        ["a", "a,b", "b"],
    ],
)
def test_a_mix_accepts_any_folder_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """Relative paths, and absolute paths as in a run's `config.json`."""
    for name in names:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for folders in (names, [str(tmp_path / name) for name in names]):
        data = DataConfig(source="tokens", mix=",".join(f"{folder}:{i + 1}" for i, folder in enumerate(folders)))
        assert [folder for folder, _ in data.mixed()] == folders
        shares = [share for _, share in data.mixed()]
        assert shares == pytest.approx([(i + 1) / sum(range(1, len(names) + 1)) for i in range(len(names))], abs=1e-6)


@pytest.mark.parametrize("mix", ["/gone/a,b:0.5,/gone/c:0.5", "C:/data, old:1,D:/x:1"])
def test_a_comma_in_a_folder_name_does_not_require_the_folder(mix: str) -> None:
    """Reports are written on machines without the data of the run."""
    assert len(DataConfig(source="tokens", mix=mix).mixed()) == 2


@pytest.mark.parametrize("size", [-1, 0, 10**8, 10**9, 10**12, 2**63, 10**400])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "n_inner", "head_dim"])
def test_an_absurd_model_size_is_rejected(name: str, size: int) -> None:
    if size == 10**8 and name == "n_positions":
        return  # published models have context lengths of 10 million tokens
    with pytest.raises(UserError, match=f"model.{name} is ") as caught:
        ModelConfig(**{name: size})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "shape",
    [
        {"n_layer": 96, "n_head": 96, "n_embd": 12288, "n_positions": 2048},  # GPT-3
        {"n_layer": 126, "n_head": 128, "n_embd": 16384, "n_positions": 131_072, "vocab_size": 128_256},  # Llama 3.1
        {"n_layer": 118, "n_head": 48, "n_embd": 18432, "n_positions": 2048, "vocab_size": 256_000},  # PaLM
        {"n_layer": 1000, "n_head": 8, "n_embd": 512},  # DeepNet
        {"n_layer": 48, "n_head": 40, "n_embd": 5120, "n_positions": 10_485_760, "vocab_size": 202_048},  # Llama 4
    ],
)
def test_the_largest_published_models_are_accepted(shape: dict[str, int]) -> None:
    assert dataclasses.asdict(ModelConfig(**shape)).items() >= shape.items()


@pytest.mark.parametrize(
    ("of", "name"),
    [
        *((RunConfig, name) for name in ("steps", "batch_tokens", "sequence_length", "eval_every", "eval_tokens")),
        *((RunConfig, name) for name in ("keep_checkpoints", "keep_every", "eval_limit", "save_every")),
        (OptimConfig, "warmup_steps"),
        (SamplingConfig, "max_tokens"),
        (SamplingConfig, "top_k"),
    ],
)
def test_an_absurd_count_is_rejected_with_its_name(of: Any, name: str) -> None:
    run = {"steps": 1, "batch_tokens": 1024, "sequence_length": 1024} if of is RunConfig else {}
    most = {"batch_tokens": 2**30, "max_tokens": 2**20}.get(name, 2**40)
    for value in (most + 1024, 10**400):
        with pytest.raises(UserError, match=rf"{name} is .* at most"):
            of(**(run | {name: value}))
