"""`degflow protocol` as a file that other commands start."""

from degflow.__main__ import protocol, start

if __name__ == "__main__":
    start(protocol)
