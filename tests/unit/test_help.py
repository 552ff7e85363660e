"""What `--help` says: a sentence for every flag, each default once, in words or as a value."""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest

from deployments.config import ApiConfig, BatchConfig, ServedModel
from rayllm.__main__ import main
from rayllm.config import EngineArgs
from rayllm.options import HelpFormatter, Options, add_arguments


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_defaults_are_told_once(capsys: pytest.CaptureFixture[str]):
    commands = re.findall(r"^ {4}(\w+) +\S", help_of(capsys=capsys).partition("COMMAND")[2], re.MULTILINE)
    assert {"generate", "chat", "serve", "batch"} <= set(commands)
    for command in commands:
        text = help_of(command, capsys=capsys)
        flags = re.split(r"^  --", text, flags=re.MULTILINE)[1:]
        assert len(flags) > 20
        for flag in flags:
            assert flag.count("default") <= 1, f"{command}: {flag}"
            assert not re.search(r"\(default:\s+(None|\(\)|\[\])", flag), f"{command}: {flag}"


@pytest.mark.parametrize("options", [EngineArgs, ServedModel, BatchConfig, ApiConfig])
def test_every_field_is_explained(options: type[Options]):
    """By sentences that stand alone; what is used instead of None is said in words, other defaults as they are."""
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    add_arguments(parser.add_argument_group("arguments"), options)
    shown = " ".join(parser.format_help().split())
    for field in dataclasses.fields(options):
        doc = field.metadata["doc"]
        assert doc[0].isupper() and doc.endswith("."), doc
        assert not doc.startswith("Of the "), doc
        if field.name == "model":
            continue
        if field.default in (None, ()):
            assert "Without " in doc
            assert doc in shown
        else:
            assert f"{doc.removesuffix('.')} (default: {field.default})." in shown
