"""Reads command lines by the parser of the command itself, without running it."""

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
from masksam_nnunet.inference.docker import options as container

FILES = ("inference/docker/container.sh", "docs/cluster/train_fold.sh", "tests/slurm/run.sh")
"""Called by their path."""
OTHERS = ("pip", "python3", "git", "docker", "sbatch", "mkdir", "cp", ".")
"""Not this project's: their lines are not looked into."""


class Misread(Exception):
    """A command line that its command would refuse."""


class _Parsed(Exception):
    """The command has read its arguments."""


def read_command(words: Sequence[str]) -> None:
    """Read a command line.

    Raises:
        Misread: unknown command, subcommand or option, a missing one, a value that is not allowed.
    """
    name, *arguments = words
    if name == "masksam":
        _read_masksam(arguments)
    elif name.startswith("nnUNetv2_"):
        _read_nnunet(name, arguments)
    elif words[:3] == ["python", "-m", "masksam_nnunet.inference.docker"]:
        _read_click(typer.main.get_command(container.app), "docker", list(words[3:]))
    elif name == "make":
        _read_make(arguments)
    elif name == "python":
        if not (ROOT / arguments[0]).is_file():
            raise Misread(f"python: no {arguments[0]}")
    elif name in FILES:
        if not (ROOT / name).is_file():
            raise Misread(f"no {name}")
    elif name not in OTHERS:
        raise Misread(f"{name} is no command that the tests know: see OTHERS")


def _read_masksam(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        _read_nnunet("nnUNetv2_train", arguments[1:])
    else:
        _read_click(typer.main.get_command(cli.app), "masksam", arguments)


def _read_click(command: Any, name: str, arguments: list[str]) -> None:
    try:
        context = command.make_context(name, arguments)
        while hasattr(command, "resolve_command"):
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, arguments, parent=context)
    except typer.Exit as end:  # --help
        if end.exit_code:
            raise Misread(f"{name} {arguments}") from end
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise Misread(f"{name} {arguments}: {error.format_message()}") from error


def _read_nnunet(name: str, arguments: list[str]) -> None:
    found = list(entry_points(group="console_scripts", name=name))
    if not found:
        raise Misread(f"{name} is no command of nnU-Net")
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        _, unknown = parse(self, arguments)  # some commands pass over what they do not know
        if unknown:
            raise Misread(f"{name} {arguments}: does not know {unknown}")
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            found[0].load()()
        except _Parsed:
            return
        except SystemExit as end:
            raise Misread(f"{name} {arguments}: refused") from end
    raise Misread(f"{name} reads no arguments")


def _read_make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Misread(f"make {arguments}: {done.stderr}")
