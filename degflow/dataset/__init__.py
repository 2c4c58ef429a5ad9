"""The dataset that `synthesize` leaves: its layout, how it is planned and written, and who reads it.

layout          names of the objects, their schemas
plan            which photographs each shard takes
scales          which scale each draw of a photograph has
writer          a shard's rows -> its objects
manifest        the records of finished shards, the rejects, manifest.parquet
card            README.md and preview.png
reader          a finished dataset, read through its manifest
pairs           ... as a PyTorch dataset of aligned crops
exports         ... as folders or tars for other trainers; `export_layouts` has one class for each layout
"""
