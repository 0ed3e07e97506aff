"""`python -m grainmill`, as jobs run it: with the Python of an image that may lack a requirement."""

import sys

try:
    from grainmill.cli.app import app

    app()
except ModuleNotFoundError as error:
    if (error.name or "grainmill").startswith("grainmill"):
        raise
    sys.exit(
        f"Grainmill's requirements must be installed where it runs, but {sys.executable} has no module {error.name}; "
        "use an image that has them (infra/docker), or install them there: pip install -c constraints.txt ."
    )
