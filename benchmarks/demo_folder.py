"""The demo's output folder: where things are in it, and what an earlier run with the same settings left done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from masksam_nnunet.errors import DemoError
from masksam_nnunet.files import read_json, write_json

_STATE = "demo.json"
PLANS = "nnUNetPlans"
PHANTOMS = "phantoms"  # in place of a dataset's folder


@dataclass(frozen=True)
class DemoSettings:
    """What a demo's result depends on.

    Attributes:
        data: folder of the raw dataset, or ``phantoms``.
        minutes: training time of each method.
        batch_size: for both methods.
        fold: one of nnU-Net's five.
        seed: of the phantoms.
        device: ``cuda`` or ``cpu``.
    """

    data: str
    minutes: float
    batch_size: int
    fold: int
    seed: int
    device: str


class DemoFolder:
    """An output folder that belongs to one demo.

    Attributes:
        root: the folder itself.
        reused: steps that an earlier run had finished and this one asked for.
    """

    def __init__(self, root: Path, settings: DemoSettings, finished: list[str]) -> None:
        """Use :meth:`open` instead."""
        self.root = root
        self.settings = settings
        self.reused: list[str] = []
        self._finished = finished

    @classmethod
    def open(cls, root: Path, settings: DemoSettings) -> DemoFolder:
        """Make the folder, or take up the demo it holds.

        Raises:
            DemoError: if it holds anything else, or a demo of other settings.
        """
        root = Path(root).absolute()
        if root.exists() and not root.is_dir():
            raise DemoError(f"--out {root} is a file; name a folder")
        state = root / _STATE
        finished: list[str] = []
        if state.is_file():
            try:
                content = read_json(state)
                before, finished = dict(content["settings"]), list(content["finished"])
            except (ValueError, KeyError, TypeError) as error:
                raise DemoError(f"{state} is damaged ({error}); give --out a new folder") from error
            now = asdict(settings)
            differing = [
                f"{key} (then {before.get(key)}, now {now.get(key)})"
                for key in sorted(now.keys() | before.keys())
                if now.get(key) != before.get(key)
            ]
            if differing:
                raise DemoError(
                    f"--out {root} holds a demo of other settings: {'; '.join(differing)}. "
                    "Give the same settings to take it up, or another folder"
                )
        elif root.is_dir() and any(root.iterdir()):
            raise DemoError(f"--out {root} is not empty and holds no demo; give a new or empty folder")
        folder = cls(root, settings, finished)
        try:
            folder._save()
        except OSError as error:
            raise DemoError(
                f"--out {root} cannot be written: {error.strerror or error}; name another folder"
            ) from error
        return folder

    @property
    def raw(self) -> Path:
        """The folder for nnUNet_raw."""
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        """The folder for nnUNet_preprocessed."""
        return self.root / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        """The folder for nnUNet_results."""
        return self.root / "nnUNet_results"

    def log(self, name: str) -> Path:
        """The log file of a step."""
        return self.root / "logs" / f"{name}.log"

    def model(self, dataset: str, trainer: str, configuration: str) -> Path:
        """The folder nnU-Net gives a trained model; its folds lie in it."""
        return self.results / dataset / f"{trainer}__{PLANS}__{configuration}"

    def take(self, step: str) -> bool:
        """Whether an earlier run finished ``step``; remembers that it was reused."""
        done = step in self._finished
        if done:
            self.reused.append(step)
        return done

    def finish(self, step: str) -> None:
        """Record a step as finished; to be called when all its files are in place."""
        self._finished.append(step)
        self._save()

    def _save(self) -> None:
        write_json(self.root / _STATE, {"settings": asdict(self.settings), "finished": self._finished})
