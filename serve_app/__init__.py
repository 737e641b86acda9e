"""HTTP: the API that Ray Serve runs, the client for it, and the command line built on that."""
