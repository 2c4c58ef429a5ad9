"""The dataset that `synthesize` makes: its layout, its plan, and how it is written and read.

layout          names and schemas of the objects
plan            the photographs of each shard
scales          the scale of each draw of a photograph
writer          a shard's rows -> its object
footer          the record and the rejects in that object's footer
manifest        which shards are done; rejects/ and manifest.parquet
references      the photographs of rows without HR bytes
card            README.md and preview.png
gallery         preview.html
reader          a finished dataset, read through its manifest
order           the order of an epoch's rows, as numbers
pairs           a finished dataset as a PyTorch dataset of aligned crops
exports         a finished dataset as folders or tars for other trainers
export_layouts  a class for each layout of an export
"""
