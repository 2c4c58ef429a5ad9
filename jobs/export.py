"""`degflow export` as a file that other commands start."""

from degflow.__main__ import export, start

if __name__ == "__main__":
    start(export)
