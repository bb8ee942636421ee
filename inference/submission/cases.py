"""The cases of a submission: predictions, their images, and the names that the challenge gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from masksam_nnunet.errors import SubmissionError
from masksam_nnunet.files import read_json
from masksam_nnunet.plans.datasets.acdc import named_frames
from masksam_nnunet.plans.datasets.checks import nifti_names

from .rules import ENDING, Rules

FRAMES = "frames.json"
_IMAGE_ENDINGS = (ENDING, ".nii", ".mha", ".mhd", ".nrrd", ".hdr", ".img", ".tif", ".tiff", ".png")
_PROBABILITIES = (".npz", ".npy", ".pkl")
_OF_NNUNET = (
    "dataset.json",
    "plans.json",
    "predict_from_raw_data_args.json",
    "summary.json",
    "postprocessing.json",
    "postprocessing.pkl",
)


@dataclass
class Found:
    """What a folder of predictions holds.

    Attributes:
        cases: the file of each case, also of one with a wrong extension.
        defects: files that do not belong there, and cases with several.
        probabilities: how many files of probabilities there are.
    """

    cases: dict[str, Path] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)
    probabilities: int = 0


def find_predictions(folder: Path, rules: Rules) -> Found:
    """Sort the content of a folder of predictions; what nnU-Net writes beside them and hidden files are passed over."""
    found = Found()
    images: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or name in _OF_NNUNET:
            continue
        if path.is_dir():
            found.defects.append(f"{name}/: a folder does not belong there")
            continue
        ending = next((end for end in _IMAGE_ENDINGS if name.lower().endswith(end)), None)
        if ending:
            images.setdefault(name[: -len(ending)], []).append(name)
        elif path.suffix in _PROBABILITIES:
            found.probabilities += 1
        else:
            found.defects.append(f"{name}: this file does not belong there")
    for case, names in images.items():
        if len(names) > 1:
            found.defects.append(f"{case}: the case is there twice, as {' and '.join(names)}; remove all but one")
        elif not names[0].endswith(ENDING):
            found.defects.append(
                f"{names[0]}: wrong extension, predictions are {case}{ENDING}; predict with the file_ending {ENDING}"
            )
        elif rules.match(case) is None:
            found.defects.append(f"{names[0]}: the name is no case's, which are like {rules.case}{ENDING}")
            continue
        if rules.match(case) is not None:
            found.cases[case] = folder / (case + ENDING if case + ENDING in names else names[0])
    return found


def find_images(folder: Path, rules: Rules) -> dict[str, Path]:
    """The image of each case in a folder: nnU-Net's CASE_0000, or as in the download, also in folders of patients.

    Raises:
        SubmissionError: there is none.
    """
    if not folder.is_dir():
        raise SubmissionError(
            f"--images {folder}: there is no such folder; name that of the images that were predicted"
        )
    inside = [folder / rules.task / "imagesTs", folder / rules.task, folder / "imagesTs"] if rules.task else []
    for place in (folder, *inside):
        found = _images_in(place, rules)
        if found:
            return found
    found = {}
    for patient in sorted(path for path in folder.iterdir() if path.is_dir()):
        found |= _images_in(patient, rules)
    if not found:
        raise SubmissionError(
            f"--images {folder} holds no image of a case like {rules.case}, neither as the challenge names them nor "
            "with nnU-Net's _0000; name the folder of the images that were predicted"
        )
    return found


def _images_in(folder: Path, rules: Rules) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in nifti_names(folder):
        stem = name.removesuffix(ENDING)
        for case in (stem, stem.removesuffix("_0000")):
            if rules.match(case) is not None:
                found.setdefault(case, folder / name)
    return found


def find_phases(images: Path | None, dataset: Path | None) -> dict[str, str]:
    """ED or ES for each case of ACDC: frames.json of ``masksam convert acdc``, or Info.cfg of the download.

    Args:
        images: the folder given with --images, the converted imagesTs or the download's testing.
        dataset: the raw dataset given with -d.

    Raises:
        SubmissionError: nothing tells.
    """
    places = [place for place in (images, images.parent if images else None, dataset) if place]
    for place in places:
        if (place / FRAMES).is_file():
            try:
                return {str(case): str(phase) for case, phase in read_json(place / FRAMES).items()}
            except (OSError, ValueError, AttributeError) as error:
                raise SubmissionError(
                    f"{place / FRAMES} cannot be read: {error}; convert the download again with masksam convert acdc"
                ) from error
    phases: dict[str, str] = {}
    for patient in sorted(images.glob("patient*")) if images else ():
        phases |= named_frames(patient)[0]
    if not phases:
        raise SubmissionError(
            "nothing tells which frame is end-diastole (ED) and which end-systole (ES): frame 01 is not always ED. "
            "Give -d with a dataset of masksam convert acdc, whose frames.json does, or --images with the download's "
            "folder testing, whose Info.cfg does"
        )
    return phases


def file_names(
    cases: Mapping[str, Path], rules: Rules, phases: Mapping[str, str] | None
) -> tuple[dict[str, str], list[str]]:
    """The challenge's file name of each case, and why some have none or share one."""
    names: dict[str, str] = {}
    defects: list[str] = []
    for case in cases:
        fields = {**(rules.match(case) or {}), "case": case, "task": rules.task or ""}
        if rules.needs_phase:
            if phases is None or phases.get(case) not in ("ED", "ES"):
                defects.append(f"{case}: neither {FRAMES} nor Info.cfg says whether this frame is ED or ES")
                continue
            fields["phase"] = phases[case]
        names[case] = rules.file_name.format(**fields)
    shared: dict[str, list[str]] = {}
    for case, name in names.items():
        shared.setdefault(name, []).append(case)
    defects += [f"{' and '.join(same)} would both be {name}" for name, same in shared.items() if len(same) > 1]
    return names, defects


def expected_names(rules: Rules) -> set[str] | None:
    """The complete list of files, None if the rules do not tell."""
    if rules.expected is None:
        return None
    keys = list(rules.expected)
    rows = product(*rules.expected.values())
    return {rules.file_name.format(**dict(zip(keys, row, strict=True))) for row in rows}
