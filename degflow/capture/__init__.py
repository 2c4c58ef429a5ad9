"""Where pairs of HR and LR images come from: cameras, scenes, and the optics between their levels."""
