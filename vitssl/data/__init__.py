"""From bytes on disk to batches of uint8 views: sources, their index, the order of a run, transforms and the loader."""
