"""The container's entry point."""

from .options import app

if __name__ == "__main__":
    app(prog_name="python -m masksam_nnunet.inference.docker")
