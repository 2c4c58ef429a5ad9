"""`degflow simulate-scenes` as a file that other commands start."""

from degflow.__main__ import simulate_scenes, start

if __name__ == "__main__":
    start(simulate_scenes)
