"""dataset.json by nnU-Net's rules: all that is wrong with it, where nnU-Net would stop at the first defect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

KEYS = ("channel_names", "labels", "numTraining", "file_ending")


def description_defects(description: Any) -> list[str]:
    """What is wrong with the content of a dataset.json, each with its remedy; empty where nothing is."""
    if not isinstance(description, dict):
        return [f"dataset.json is no JSON object but {_short(description)}; write one with {', '.join(KEYS)}"]
    missing = [key for key in KEYS if key not in description]
    if missing:
        return [f"dataset.json has no {', '.join(missing)}; nnU-Net needs {', '.join(KEYS)}"]
    checks = (_channels, _labels, _number, _ending, _listed)
    return [f"dataset.json: {defect}" for check in checks for defect in check(description)]


def _channels(description: dict[str, Any]) -> Iterator[str]:
    channels = description["channel_names"]
    if (
        not isinstance(channels, dict)
        or set(channels) != {str(number) for number in range(len(channels))}
        or not all(isinstance(name, str) for name in channels.values())
    ):
        yield f'channel_names must be {{"0": NAME, "1": NAME, ...}}, found {_short(channels)}'
    elif not channels:
        yield 'channel_names is empty; name at least one, such as {"0": "CT"}'


def _labels(description: dict[str, Any]) -> Iterator[str]:
    labels = description["labels"]
    if not isinstance(labels, dict) or not all(_is_label(value) for value in labels.values()):
        flipped = isinstance(labels, dict) and all(str(key).isdecimal() for key in labels)
        yield (
            'labels must be {"background": 0, NAME: 1, NAME: 2, ...} with whole numbers, or lists of them for regions, '
            f"found {_short(labels)}"
            + ("; swap names and numbers: in nnU-Net v2 names come first" if flipped and labels else "")
        )
        return
    if labels.get("background") not in (0, "0"):
        yield f'labels must have "background": 0, found {_short(labels)}'
        return
    ignore = labels.get("ignore")
    values = {
        name: [int(number) for number in (value if isinstance(value, list) else [value])]
        for name, value in labels.items()
        if name != "ignore"
    }
    found = sorted({number for numbers in values.values() for number in numbers})
    regions = any(len(numbers) > 1 for numbers in values.values())
    if len(found) < 2:
        yield "labels has no foreground; name at least one"
    if found != list(range(len(found))):
        numbers = ", ".join(map(str, found))
        yield f"labels must be 0, 1, 2, ... without gaps, found {numbers}; renumber them, in the files too"
    if "ignore" in labels and ignore != found[-1] + 1:
        yield f'"ignore" must be the highest label, {found[-1] + 1} here, found {_short(ignore)}'
    if not regions:
        times = Counter(number for numbers in values.values() for number in numbers)
        twice = [str(number) for number, count in times.items() if count > 1]
        if twice:
            yield f"labels names {', '.join(twice)} more than once; give each name a value of its own"
        return
    number = sum(set(numbers) != {0} for numbers in values.values())
    order = description.get("regions_class_order")
    if not isinstance(order, list) or len(order) != number or not all(_is_int(value) for value in order):
        yield (
            f"labels has {number} regions, so regions_class_order must be a list of {number} labels, in the order of "
            f"labels, found {_short(order)}"
        )


def _number(description: dict[str, Any]) -> Iterator[str]:
    number = description["numTraining"]
    if not _is_int(number) or number < 0:
        yield f"numTraining must be the number of training cases, found {_short(number)}"


def _ending(description: dict[str, Any]) -> Iterator[str]:
    ending = description["file_ending"]
    known = sorted({name for reader in LIST_OF_IO_CLASSES for name in reader.supported_file_endings})
    if not isinstance(ending, str) or ending.lower() not in known:
        yield f"file_ending must be one that nnU-Net reads ({', '.join(known)}), found {_short(ending)}"


def _listed(description: dict[str, Any]) -> Iterator[str]:
    listed = description.get("dataset", {})
    if not isinstance(listed, dict) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("label"), str)
        and isinstance(entry.get("images"), list)
        and all(isinstance(image, str) for image in entry["images"])
        for entry in listed.values()
    ):
        yield f'"dataset" must be {{CASE: {{"images": [FILE, ...], "label": FILE}}, ...}}, found {_short(listed)}'


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_label(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    # nnU-Net takes "1" too.
    return bool(numbers) and all(
        _is_int(number) or (isinstance(number, str) and number.isdecimal()) for number in numbers
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
