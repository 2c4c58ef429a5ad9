"""`degflow explore` as a file that other commands start."""

from degflow.__main__ import explore, start

if __name__ == "__main__":
    start(explore)
