"""Parses command lines with the parser of each command, without running them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import pytest
import typer
from documented import ROOT

from masksam_nnunet.cli import app as cli
from masksam_nnunet.inference.docker.__main__ import app as container

OTHERS = ("pip", "python3", "git", "sbatch", "srun", "mkdir", ".")
"""Commands of other projects, whose arguments are not checked."""


class Refused(Exception):
    """A command does not accept its arguments."""


class _Parsed(Exception):
    """A command accepts its arguments."""


def parse(words: Sequence[str]) -> None:
    """Parse a command line.

    Raises:
        Refused: the command is unknown, or it does not accept an argument.
    """
    name, *arguments = words
    if words[:2] == ["masksam", "train"]:
        _parse_nnunet("nnUNetv2_train", list(words[2:]))
    elif name == "masksam":
        _parse_click(typer.main.get_command(cli.app), name, arguments)
    elif name.startswith("nnUNetv2_"):
        _parse_nnunet(name, arguments)
    elif words[:3] == ["python", "-m", "masksam_nnunet.inference.docker"]:
        _parse_click(typer.main.get_command(container), "docker", list(words[3:]))
    elif name == "make":
        if subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True).returncode:
            raise Refused(f"make {arguments}")
    elif (name == "python" and arguments[0].endswith(".py")) or name.endswith(".sh"):
        file = arguments[0] if name == "python" else name
        if not (ROOT / file).is_file():
            raise Refused(f"no {file}")
    elif name not in OTHERS and not (name.startswith(".venv/bin/") and name.split("/")[-1] in ("pytest", "ruff")):
        raise Refused(f"unknown command {name}")


def _parse_click(command: Any, name: str, arguments: list[str]) -> None:
    try:
        context = command.make_context(name, arguments)
        while hasattr(command, "resolve_command"):
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, arguments, parent=context)
    except typer.Exit as end:  # --help
        if end.exit_code:
            raise Refused(f"{name} {arguments}") from end
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise Refused(f"{name} {arguments}: {error.format_message()}") from error


def _parse_nnunet(name: str, arguments: list[str]) -> None:
    found = list(entry_points(group="console_scripts", name=name))
    if not found:
        raise Refused(f"{name} is not a command of nnU-Net")
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse_only(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        _, unknown = parse_known(self, arguments)  # some commands ignore what they do not know
        if unknown:
            raise Refused(f"{name} {arguments}: unknown {unknown}")
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            found[0].load()()
        except _Parsed:
            return
        except SystemExit as end:
            raise Refused(f"{name} {arguments}") from end
    raise Refused(f"{name} takes no arguments")
