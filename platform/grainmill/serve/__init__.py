"""The application that Ray Serve runs: a registered model behind HTTP, which follows an alias."""
