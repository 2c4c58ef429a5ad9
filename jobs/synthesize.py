"""`degflow synthesize` as a file that other commands start."""

from degflow.__main__ import start, synthesize

if __name__ == "__main__":
    start(synthesize)
