"""The HTTP API that Ray Serve runs, its Python client, and the command line built on the client."""
