"""What this system can do to a picture: a folder for each workflow, and code to read them."""
