"""`python -m grainmill`."""

from grainmill.cli import app

app()
