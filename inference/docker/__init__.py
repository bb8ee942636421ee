"""A trained model as a Grand Challenge algorithm container: ``python -m masksam_nnunet.inference.docker``.

``options`` the command · ``surroundings`` the only folder that is written beside the output · ``interface`` what the
platform gives and wants · ``images`` its files · ``models`` the model folder · ``time_limit`` what fits into it ·
``algorithm`` one case after another · ``errors`` and their exit codes.
"""
