"""The three forms of a configuration, and one clear line for every mistake."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanotrain import config
from nanotrain.__main__ import STAGES, main


@dataclass(frozen=True)
class Section:
    """A section."""

    rate: float = 0.5
    """Speed [steps per second]."""
    count: int = 3
    """How many."""
    on: bool = False
    """Whether."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    names: tuple[str, ...] = ()
    """Names."""
    limit: int | None = None
    """Limit or none."""


@dataclass(frozen=True)
class Whole:
    """Keys."""

    resume: str = "none"
    """Go on."""
    train: Section = field(default_factory=Section)


def parse(*argv):
    return config.parse(Whole, list(argv), command="test")


def test_both_ways_of_writing_a_flag():
    got, given_keys = parse("--train.rate=2", "--train.count", "1e3", "--train.on", "--train.names=x,y", "--train.limit", "7", "--resume", "auto")
    assert got == Whole("auto", Section(2.0, 1000, True, "a", ("x", "y"), 7))
    assert given_keys == {"train.rate", "train.count", "train.on", "train.names", "train.limit", "resume"}
    assert parse("--train.on", "false", "--train.limit=none")[0].train == Section()


def test_command_line_beats_file_whatever_the_order(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('resume = "auto"\n[train]\nrate = 3\ncount = 8\n')
    assert parse("--train.rate=9", "--config", str(file))[0] == Whole("auto", Section(9.0, 8))


@given(
    st.builds(
        Whole,
        resume=st.text(st.characters(exclude_categories=["Cs"])),
        train=st.builds(
            Section,
            rate=st.floats(allow_nan=False),
            count=st.integers(-(10**12), 10**12),
            on=st.booleans(),
            kind=st.sampled_from("ab"),
            names=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
            limit=st.none() | st.integers(),
        ),
    )
)
def test_toml_gives_back_every_config(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "round.toml"
    file.write_bytes(config.write_toml(value).encode())
    assert config.build(Whole, config.read_toml(Whole, str(file))) == value


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--train.rat=1"], "--train.rat: unknown key; did you mean --train.rate?"),
        (["--rate=1"], "--rate: unknown key; did you mean --train.rate?"),
        (["--train.count=1.5"], "--train.count: '1.5' is not INT"),
        (["--train.kind=c"], "--train.kind: 'c' is not {a,b}"),
        (["--train.on=maybe"], "--train.on: 'maybe' is not true|false"),
        (["--train.rate"], "--train.rate: a value is missing"),
        (["train.rate=1"], "expected --section.key=value"),
        (["--config=/nowhere.toml"], "--config /nowhere.toml: No such file"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_in_a_file_name_file_and_key(tmp_path):
    file = tmp_path / "c.toml"
    for text, message in (
        ("[train]\nrat = 1", f"{file}: train.rat: unknown key; did you mean --train.rate?"),
        ("[train]\ncount = 'x'", f"{file}: train.count: 'x' is not INT"),
        ("[train", "not valid TOML"),
        ("[train]\non = 1", "true|false"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError) as caught:
            parse("--config", str(file))
        assert message in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage_lists_every_key_with_default_and_doc(stage, capsys):
    assert main([stage, "--help"]) == 0
    text = capsys.readouterr().out
    import importlib

    config_class = getattr(importlib.import_module(STAGES[stage][0]), "Config", None)
    if config_class is None:  # it takes run folders, no keys
        assert text.startswith(f"usage: nanotrain {stage} ")
        return
    for key in config.keys(config_class):
        assert f"--{key} " in text
        owner = config_class
        *sections, name = key.split(".")
        for section in sections:
            owner = config.get_type_hints(owner)[section]
        doc = config.field_docs(owner).get(name)
        assert doc, f"{key} has no docstring"
        assert config.get_type_hints(owner)[name] not in (int, float) or re.search(r"\[.+\]", doc), f"{key} has no [unit]"
    defaults = config.flatten(config_class())
    shown = dict(re.findall(r"^  --(\S+) \S.* \(default: (.*)\)$", text, re.MULTILINE))
    assert shown == {key: config._plain(value) for key, value in defaults.items()}


def test_unknown_stage_and_unknown_key_exit_with_two(capsys):
    assert main(["fly"]) == 2 and main(["pretrain", "--trian.steps=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "nanotrain fly: fly: no such stage; one of " + ", ".join(STAGES),
        "nanotrain pretrain: --trian.steps: unknown key; did you mean --train.steps?",
    ]
