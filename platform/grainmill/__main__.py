from grainmill.cli import app

app()
