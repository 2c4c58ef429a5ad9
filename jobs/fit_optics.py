"""`degflow fit-optics` as a file that other commands start."""

from degflow.__main__ import fit_optics, start

if __name__ == "__main__":
    start(fit_optics)
