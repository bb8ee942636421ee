"""Makes documented commands fit two CPU cores and minutes: on PYTHONPATH of all processes of theirs.

Nothing is accepted here that the real commands would not accept. What is changed:

- commands that train or predict get ``-device cpu`` (``--devices cpu``, ``--device cpu``) unless the line names one,
  and trainings have no data loading workers;
- a training is one epoch of one iteration, in batches of two; one that goes by the clock is ten seconds; its
  predictions are not mirrored;
- SAM's ViT-B, L and H are the tests' small SAM, and the released file is the one that DOCS_SAM_SHA256 names; networks
  with it have the tiny network's widths;
- ACDC's training part is its first DOCS_ACDC_PATIENTS patients;
- Task04_Hippocampus.tar is the file at DOCS_HIPPOCAMPUS, an address and an MD5.
"""

import importlib.util
import os
import sys
from dataclasses import replace

TRAINING_SECONDS = 10.0
DEVICE_OPTIONS = {
    "nnUNetv2_train": "-device",
    "nnUNetv2_predict": "-device",
    "nnUNetv2_predict_from_modelfolder": "-device",
    "masksam train": "-device",
    "masksam predict": "-device",
    "masksam explain": "-device",
    "masksam benchmark": "--devices",
}


def add_device(words):
    """``words``, a command line, with the CPU as its device."""
    name = os.path.basename(words[0])
    name = f"{name} {words[1]}" if name == "masksam" and len(words) > 1 else name
    if name.endswith("train"):
        os.environ["nnUNet_n_proc_DA"] = "0"  # only there: it makes planning fail
    option = DEVICE_OPTIONS.get(name)
    return [] if option is None or option in words or {"-h", "--help"} & set(words) else [option, "cpu"]


def shorten_training(module):
    initialize = module.nnUNetTrainer.initialize

    def short(self):
        self.num_epochs = min(self.num_epochs, 1)
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1
        self.configuration_manager.configuration["batch_size"] = 2
        initialize(self)
        self.inference_allowed_mirroring_axes = None

    module.nnUNetTrainer.initialize = short


def shorten_budget(module):
    given = module.budget_seconds
    module.budget_seconds = lambda: min(given(), TRAINING_SECONDS)


def shrink_sam(module):
    from small_sam import SMALL_SAM

    module.SPECS.update(dict.fromkeys(("vit_b", "vit_l", "vit_h"), SMALL_SAM))


def narrow(module):
    module.SAM_PROFILE = replace(
        module.TINY_PROFILE, max_tflop=module.SAM_PROFILE.max_tflop, upsampling=module.SAM_PROFILE.upsampling
    )


def expect_small_sam(module):
    for name, release in list(module.SAM_RELEASES.items()):
        module.SAM_RELEASES[name] = module.SamRelease(release.file_name, release.url, os.environ["DOCS_SAM_SHA256"])


def expect_small_hippocampus(module):
    module.URL, module.get_hippocampus.__kwdefaults__["md5"] = os.environ["DOCS_HIPPOCAMPUS"].split()


def expect_few_patients(module):
    module._PATIENTS["training"] = range(1, int(os.environ["DOCS_ACDC_PATIENTS"]) + 1)


CHANGES = {
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": shorten_training,
    "masksam_nnunet.trainers.time_budget": shorten_budget,
    "masksam_nnunet.modeling.backbones.registry": shrink_sam,
    "masksam_nnunet.sam_weights": expect_small_sam,
    "masksam_nnunet.plans.derive": narrow,
    "masksam_nnunet.plans.datasets.acdc": expect_few_patients,
    "masksam_nnunet.plans.datasets.hippocampus": expect_small_hippocampus,
}


class ChangedModules:
    """Finds the modules of CHANGES as Python does, and changes each when it has been run."""

    def __init__(self):
        self.busy = set()

    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES or name in self.busy:
            return None
        self.busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)
        run = spec.loader.exec_module

        def run_and_change(module):
            run(module)
            CHANGES[name](module)

        spec.loader.exec_module = run_and_change
        return spec


sys.meta_path.insert(0, ChangedModules())
if "DOCS_SAM_SHA256" in os.environ and sys.argv and sys.argv[0] not in ("", "-c", "-m"):
    sys.argv += add_device(sys.argv)
