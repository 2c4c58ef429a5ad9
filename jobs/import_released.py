"""`degflow import-released` as a file that other commands start."""

from degflow.__main__ import import_released, start

if __name__ == "__main__":
    start(import_released)
