"""A trained model as a Grand Challenge algorithm container: ``python -m masksam_nnunet.inference.docker``.

``__main__`` the command · ``interface`` what the platform gives and wants · ``images`` its files · ``algorithm`` loads
the model and predicts one case after another.
"""
