"""HR images in a folder or an object store -> a dataset of LR images at sampled scales, on a pool of Ray actors.

1. `synthesize` loads the model, resolves the configuration and compares it with the one of an unfinished run.
2. The input is listed once and dealt into shards; this plan is written before any work starts. It never changes, but
   `extend` and `retry_rejects` add shards to it.
3. Ray Data streams the missing shards to a pool of actors, with or without GPUs (see `pool`). Each holds a degrader
   and turns one whole shard at a time into its objects (see `shards`), reporting finished images as it goes. Beside
   GPUs, files are decoded and encoded by Ray tasks on any node's CPUs (see `codec`).
4. When every shard is done: the manifest, the card, the preview, and last `_SUCCESS` (see `dataset`).
"""
